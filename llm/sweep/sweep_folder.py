"""Finds or creates a sweep's folder, locks it while its jobs run, and reports its outcome."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock, Timeout

from llm.errors import ConfigError
from llm.run_folder.folder import RunFolder
from llm.sweep.manifest import DONE, MANIFEST, Manifest, SweepJob, find_unfinished, merge, read_notes, read_sweep
from llm.sweep.monitor import Monitor
from llm.sweep.prune import Pruning

WRITTEN = (".sweep.lock", "multirun.yaml", "optimization_results.yaml", "report")
"""Names in a sweep's folder that a sweep writes, besides its manifest and the folders of its jobs."""
GRACE_SECONDS = 60.0
"""Seconds that a stopped sweep waits for jobs that are saving a checkpoint."""
LOCK = ".sweep.lock"
"""File that the process of a running sweep holds locked."""


def resolve_folder(resume: str | None, default: Path, command: Sequence[str]) -> Path:
    """Return the folder of a sweep: that of the sweep to resume, or `default`.

    Args:
        resume: a sweep's folder, `auto` for the newest unfinished sweep of the same command beside `default`, or None
            for a new sweep.
        default: the folder of a new sweep. A sweep of the same command in it is resumed.
        command: the sweep's arguments.

    Raises:
        ConfigError: the folder to resume has no sweep, or a sweep of another command.
    """
    if resume is None or resume == "auto":
        found = find_unfinished(default.parent, command) if resume == "auto" else None
        folder = default if found is None or is_held(found) or (default / MANIFEST).exists() else found
    else:
        folder = Path(resume)
    if (folder / MANIFEST).exists() and resume != str(folder) and read_sweep(folder).command != tuple(command):
        raise ConfigError(
            f"hydra.sweep.dir={folder}: has a sweep of another command; choose another folder, "
            f"or resume that sweep with -m sweep.resume={folder}"
        )
    return folder.absolute()


def resumed_command(resume: str | None, given: Sequence[str]) -> list[str]:
    """Return the arguments of the sweep to resume, or those `given` where `resume` names no folder.

    Raises:
        ConfigError: the folder has no sweep, or the given arguments differ from the sweep's own.
    """
    if resume is None or resume == "auto":
        return list(given)
    kept = list(read_sweep(Path(resume)).command)
    if given and list(given) != kept:
        raise ConfigError(
            f"sweep.resume={resume}: resumes its own command, {' '.join(kept)}; remove the other arguments, "
            "or start a new sweep"
        )
    return kept


def is_held(folder: Path) -> bool:
    """Return whether a process runs the sweep in `folder`."""
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


@contextlib.contextmanager
def open_sweep(
    folder: Path,
    command: Sequence[str],
    jobs: Sequence[SweepJob],
    swept: Sequence[str],
    line_every: float,
    prune: Pruning | None = None,
) -> Iterator[Monitor]:
    """Lock a sweep's folder while its jobs run, and keep its manifest up to date.

    Args:
        folder: the sweep's folder, which is created when missing.
        command: the sweep's arguments.
        jobs: the jobs that are known in advance. Others are added when they start.
        swept: keys that differ between jobs.
        line_every: seconds between lines about a running job.
        prune: the rule that ends jobs early, which the manifest stores.

    Raises:
        ConfigError: the folder cannot be written, or another process runs its sweep.
    """
    with _locked(folder):
        manifest = _start_manifest(folder, command, jobs, swept, prune)
        monitor = Monitor(folder, manifest, line_every=line_every)
        try:
            with monitor:
                try:
                    yield monitor
                finally:
                    _settle(folder)
        finally:
            monitor.manifest = replace(monitor.manifest, state=_state(monitor.manifest))
            monitor.manifest.write(folder)
            sys.stderr.write(_summary(monitor.manifest, folder))


def _locked(folder: Path) -> FileLock:
    """Return the acquired lock of a sweep's folder."""
    if not (folder / MANIFEST).exists() and (found := [name for name in WRITTEN if (folder / name).exists()]):
        raise ConfigError(
            f"hydra.sweep.dir={folder}: has {', '.join(found)}, which a sweep would replace; choose another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise ConfigError(f"sweep.resume={folder}: another process runs this sweep; wait for it, or stop it") from None
    except OSError as error:
        raise ConfigError(
            f"hydra.sweep.dir={folder}: {error.strerror}; choose a folder with write permission"
        ) from error
    return lock


def _start_manifest(
    folder: Path, command: Sequence[str], jobs: Sequence[SweepJob], swept: Sequence[str], prune: Pruning | None
) -> Manifest:
    """Write and return the manifest of a sweep that starts or is resumed, and print its folder."""
    is_resumed = (folder / MANIFEST).exists()
    manifest = read_sweep(folder) if is_resumed else Manifest(command=tuple(command))
    known = merge(manifest.jobs or tuple(jobs), read_notes(folder))
    manifest = replace(manifest, jobs=known, swept=tuple(swept), state="running", prune=prune and asdict(prune))
    manifest.write(folder)
    done = sum(job.state in DONE for job in manifest.jobs)
    progress = f", {done} of {len(manifest.jobs)} jobs are done" if is_resumed else ""
    sys.stdout.write(f"sweep folder {_short(folder)}{progress}\n")
    return manifest


def _settle(folder: Path) -> None:
    """Wait for jobs that are saving a checkpoint, and record jobs without a process as stopped."""
    deadline = time.monotonic() + GRACE_SECONDS
    for job in read_notes(folder):
        if job.state != "running":
            continue
        while RunFolder(folder / job.folder, is_writer=False).is_live() and time.monotonic() < deadline:
            time.sleep(0.2)
        replace(job, state="stopped", reason="the sweep was stopped").write(folder)


def _state(manifest: Manifest) -> str:
    states = {job.state for job in manifest.jobs}
    if states & {"stopped", "pending", "running"}:
        return "stopped"
    return "failed" if "failed" in states else "finished"


def exit_status(manifest: Manifest) -> int:
    """Return 0 where every job finished or was pruned, else 1."""
    return 0 if manifest.state == "finished" else 1


def _summary(manifest: Manifest, folder: Path) -> str:
    """Return which jobs failed and why, and how to resume the sweep. Return "" where every job is done."""
    failed = [job for job in manifest.jobs if job.state == "failed"]
    open_jobs = [job for job in manifest.jobs if job.state not in ("failed", *DONE)]
    lines = [f"failed: {job.brief(manifest.swept)}: {job.reason}; see {_short(folder / job.folder)}" for job in failed]
    if failed or open_jobs:
        count = len(manifest.jobs)
        done = count - len(failed) - len(open_jobs)
        lines.append(f"{done} of {count} jobs done, {len(failed)} failed; resume with -m sweep.resume={_short(folder)}")
    return "".join(f"{line}\n" for line in lines)


def _short(path: Path) -> str:
    """Return a path relative to the working directory where it lies in it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
