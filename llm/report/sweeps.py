"""Finds the jobs of sweeps that have not started yet."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from llm.errors import ConfigError
from llm.sweep.manifest import MANIFEST, Manifest, read_sweep
from llm.sweep.sweep_folder import is_held


class PendingJobs(NamedTuple):
    """The remaining work of the sweeps in some folders."""

    pending: int
    """Jobs that have not started."""
    is_open: bool
    """Whether a process runs one of the sweeps."""


def pending_jobs(folders: Iterable[Path]) -> PendingJobs:
    """Return the remaining work of the sweeps in and under `folders`."""
    found = {path: manifest for folder in folders for path, manifest in sweeps_in(folder)}
    pending = sum(job.state == "pending" for manifest in found.values() for job in manifest.jobs)
    return PendingJobs(pending, any(map(is_held, found)))


def holds_sweep(folder: Path) -> bool:
    """Return whether there is a sweep in or under a folder, even if none of its jobs has started."""
    return next(sweeps_in(folder), None) is not None


def sweeps_in(folder: Path) -> Iterator[tuple[Path, Manifest]]:
    """Yield the folder and the manifest of each sweep in or under a folder."""
    for path in folder.rglob(MANIFEST):
        if "checkpoints" in path.parts:  # a checkpoint's manifest has the same name
            continue
        try:
            yield path.parent, read_sweep(path.parent)
        except ConfigError:
            continue  # not a sweep's manifest
