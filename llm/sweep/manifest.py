"""What a sweep consists of and what became of it: one manifest in its folder, one note in each job's."""

import json
import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llm.errors import ConfigError

MANIFEST, NOTE = "manifest.json", "job.json"
State = Literal["pending", "running", "finished", "pruned", "failed", "stopped"]
DONE = ("finished", "pruned")
"""States of jobs for which nothing is left to do."""


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """One job of a sweep, as its note says.

    Args:
        overrides: what its command line sets; they identify it.
        folder: its run folder, relative to the sweep's.
        state: what it is doing; a job whose process was killed is `failed`, one told to stop is `stopped`, one that
            the sweep ended early is `pruned`.
        reason: why it failed, stopped or was pruned, or "".
        value: its validation loss once it has finished, the last one if it was pruned.
        attempts: how often it was started.
        began: when it was last started, seconds since 1970.
        seconds: how long the last start took, until it ended.
        exit_status: of its process, negative for a signal.
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
        """What makes two jobs the same, in whatever order their overrides stand."""
        return tuple(sorted(self.overrides))

    def write(self, sweep: Path) -> None:
        """Write the note into the job's folder, in one step."""
        write_json(sweep / self.folder / NOTE, asdict(self))

    def brief(self, keys: Iterable[str]) -> str:
        """Return what it sets of these keys, for a line on a terminal."""
        own = [override for override in self.overrides if override.split("=")[0].lstrip("+~") in keys]
        return " ".join(own) or self.folder or "the job"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A sweep's command and its jobs.

    Args:
        command: the arguments it was started with, without `-m` and `sweep.…`; they identify it.
        state: running until every job has ended or the sweep was told to stop.
        created: when it began, seconds since 1970.
        jobs: all that are known, those that have not begun too.
        swept: keys that differ between jobs, which tell one from the others.
        prune: the rule by which jobs end early, as its settings; None: none.
    """

    command: tuple[str, ...]
    state: Literal["running", "finished", "failed", "stopped"] = "running"
    created: float = field(default_factory=time.time)
    jobs: tuple[SweepJob, ...] = ()
    swept: tuple[str, ...] = ()
    prune: dict[str, Any] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self.jobs) and all(job.state in DONE for job in self.jobs)

    def write(self, sweep: Path) -> None:
        """Write it into the sweep's folder, in one step."""
        write_json(sweep / MANIFEST, asdict(self))


def read_sweep(sweep: Path) -> Manifest:
    """Return a sweep's manifest, its jobs as their own notes tell.

    Raises:
        ConfigError: the folder holds no sweep, or a manifest that is broken.
    """
    try:
        fields = json.loads((sweep / MANIFEST).read_text())
        jobs = tuple(_job(fields) for fields in fields.pop("jobs"))
        lists = {key: tuple(fields[key]) for key in ("command", "swept") if key in fields}
        manifest = Manifest(**{**fields, **lists}, jobs=jobs)
    except FileNotFoundError:
        raise ConfigError(f"sweep.resume={sweep}: holds no {MANIFEST}; name a sweep's folder, multirun/…") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"sweep.resume={sweep}: its {MANIFEST} cannot be read ({error}); start anew") from error
    return replace(manifest, jobs=merge(jobs, read_notes(sweep)))


def read_notes(sweep: Path) -> list[SweepJob]:
    """Return the notes of all jobs that have begun."""
    notes = []
    for path in sorted(sweep.rglob(NOTE)):
        try:
            notes.append(replace(_job(json.loads(path.read_text())), folder=str(path.parent.relative_to(sweep))))
        except (OSError, ValueError, TypeError):
            continue  # written by someone else, or going away
    return notes


def _job(fields: dict[str, Any]) -> SweepJob:
    return SweepJob(**{**fields, "overrides": tuple(fields["overrides"])})


def merge(known: Sequence[SweepJob], notes: Sequence[SweepJob]) -> tuple[SweepJob, ...]:
    """Return the known jobs as their notes tell, then those that nobody foretold."""
    told = {note.key: note for note in notes}
    return (*(told.pop(job.key, job) for job in known), *told.values())


def find_unfinished(parent: Path, command: Sequence[str]) -> Path | None:
    """Return the newest sweep in `parent` that was started with `command` and has not finished, or None."""
    for path in sorted(parent.glob(f"*/{MANIFEST}"), key=lambda p: p.parent.name, reverse=True):
        try:
            manifest = read_sweep(path.parent)
        except ConfigError:
            continue
        if manifest.command == tuple(command):
            return None if manifest.is_complete else path.parent
    return None


def write_json(path: Path, content: Any) -> None:
    """Write a file in one step: a reader sees the old or the new one."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def signal_name(number: int) -> str:
    """Return the name of a signal: SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
