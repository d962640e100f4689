"""Records the jobs of a sweep and their outcomes: a manifest in the sweep's folder, and a note in each job's folder."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llm.errors import ConfigError
from llm.run_folder.atomic_files import replace_json

MANIFEST = "manifest.json"
"""File of a sweep's folder that lists its command and jobs."""
NOTE = "job.json"
"""File of a job's folder that records the job."""
State = Literal["pending", "running", "finished", "pruned", "failed", "stopped"]
DONE = ("finished", "pruned")
"""States of jobs that need no further run."""


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """One job of a sweep, as its note records it.

    Args:
        overrides: its command line, which identifies it.
        folder: its run folder, relative to the sweep's folder.
        state: its progress or outcome. A job whose process was killed is `failed`, a job that received a stopping
            signal is `stopped`, and a job that the sweep ended early is `pruned`.
        reason: why it failed, stopped or was pruned, or "".
        value: its final validation loss, or the last one of a pruned job.
        attempts: number of starts.
        began: time of the last start, in seconds since 1970.
        seconds: duration of the last start.
        exit_status: exit status of its process, negative for a signal.
    """

    overrides: tuple[str, ...]
    folder: str = ""
    state: State = "pending"
    reason: str = ""
    value: float | None = None
    attempts: int = 0
    began: float | None = None
    seconds: float | None = None
    exit_status: int | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies the job independently of the order of its overrides."""
        return tuple(sorted(self.overrides))

    def write(self, sweep: Path) -> None:
        """Write the note into the job's folder in one step."""
        replace_json(sweep / self.folder / NOTE, asdict(self))

    def brief(self, keys: Iterable[str]) -> str:
        """Return the job's overrides of these keys, for one line on a terminal."""
        own = [override for override in self.overrides if override.split("=")[0].lstrip("+~") in keys]
        return " ".join(own) or self.folder or "the job"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A sweep's command and its jobs.

    Args:
        command: its arguments without `-m` and `sweep.…`, which identify it.
        state: `running` until every job has ended or a signal stops the sweep.
        created: time of the first start, in seconds since 1970.
        jobs: all known jobs, including those that have not started.
        swept: keys that differ between jobs.
        prune: settings of the rule that ends jobs early, None for no rule.
    """

    command: tuple[str, ...]
    state: Literal["running", "finished", "failed", "stopped"] = "running"
    created: float = field(default_factory=time.time)
    jobs: tuple[SweepJob, ...] = ()
    swept: tuple[str, ...] = ()
    prune: dict[str, Any] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every job has finished or was pruned."""
        return bool(self.jobs) and all(job.state in DONE for job in self.jobs)

    def write(self, sweep: Path) -> None:
        """Write the manifest into the sweep's folder in one step."""
        replace_json(sweep / MANIFEST, asdict(self))


def read_sweep(sweep: Path) -> Manifest:
    """Return a sweep's manifest, with each job as its own note records it.

    Raises:
        ConfigError: the folder has no manifest, or a corrupt one.
    """
    try:
        fields = json.loads((sweep / MANIFEST).read_text())
        jobs = tuple(_job(fields) for fields in fields.pop("jobs"))
        lists = {key: tuple(fields[key]) for key in ("command", "swept") if key in fields}
        manifest = Manifest(**{**fields, **lists}, jobs=jobs)
    except FileNotFoundError:
        raise ConfigError(
            f"sweep.resume={sweep}: has no {MANIFEST}; name a sweep's folder, such as multirun/<folder>"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{sweep / MANIFEST}: not the manifest of a sweep ({error}); choose another folder"
        ) from error
    return replace(manifest, jobs=merge(jobs, read_notes(sweep)))


def read_notes(sweep: Path) -> list[SweepJob]:
    """Return the notes of all jobs that were started."""
    notes = []
    for path in sorted(sweep.rglob(NOTE)):
        try:
            notes.append(replace(_job(json.loads(path.read_text())), folder=str(path.parent.relative_to(sweep))))
        except (OSError, ValueError, TypeError, KeyError):
            continue  # not a job's note, or removed meanwhile
    return notes


def _job(fields: dict[str, Any]) -> SweepJob:
    return SweepJob(**{**fields, "overrides": tuple(fields["overrides"])})


def merge(known: Sequence[SweepJob], notes: Sequence[SweepJob]) -> tuple[SweepJob, ...]:
    """Return the known jobs as their notes record them, then the jobs that only a note names."""
    recorded = {note.key: note for note in notes}
    return (*(recorded.pop(job.key, job) for job in known), *recorded.values())


def find_unfinished(parent: Path, command: Sequence[str]) -> Path | None:
    """Return the newest sweep in `parent` with this command if it is unfinished, else None."""
    for path in sorted(parent.glob(f"*/{MANIFEST}"), key=lambda p: p.parent.name, reverse=True):
        try:
            manifest = read_sweep(path.parent)
        except ConfigError:
            continue
        if manifest.command == tuple(command):
            return None if manifest.is_complete else path.parent
    return None
