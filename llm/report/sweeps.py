"""What sweeps still have before them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from llm.errors import ConfigError
from llm.sweep.manifest import MANIFEST, Manifest, read_sweep
from llm.sweep.sweep import is_held


class PendingJobs(NamedTuple):
    """What is still to come in some folders."""

    pending: int
    """Jobs that have not begun."""
    is_open: bool
    """Whether a process runs one of the sweeps."""


def pending_jobs(folders: Iterable[Path]) -> PendingJobs:
    """Return what the sweeps among and under `folders` have before them."""
    found = {path: manifest for folder in folders for path, manifest in _sweeps(folder)}
    pending = sum(job.state == "pending" for manifest in found.values() for job in manifest.jobs)
    return PendingJobs(pending, any(map(is_held, found)))


def holds_sweep(folder: Path) -> bool:
    """Tell whether there is a sweep in or under a folder, though none of its jobs may have begun."""
    return next(_sweeps(folder), None) is not None


def _sweeps(folder: Path) -> Iterator[tuple[Path, Manifest]]:
    for path in folder.rglob(MANIFEST):
        if "checkpoints" in path.parts:  # they have manifests of their own
            continue
        try:
            yield path.parent, read_sweep(path.parent)
        except ConfigError:
            continue  # being written by someone else, or something else
