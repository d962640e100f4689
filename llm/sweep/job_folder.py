"""Chooses the folder of a job, and clears it before a job without a checkpoint starts again.

A job uses a folder that is new, empty, or recorded as its own by its note. Files that a run does not write are never
removed.
"""

import contextlib
import itertools
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from llm.errors import ConfigError
from llm.run_folder.ownership import HYDRA_NOTES, INCOMPLETE, WRITTEN
from llm.sweep.manifest import NOTE, SweepJob, read_notes


def claim_folder(sweep: Path, overrides: tuple[str, ...], folder: Path) -> SweepJob:
    """Return the job as an earlier start recorded it, or a new job with a folder that is new or empty.

    Where `folder` has any contents, the job gets the next free name, such as `0_dense-2`.

    Raises:
        ConfigError: `folder` is not below the sweep's folder.
    """
    job = SweepJob(overrides=overrides)
    notes = read_notes(sweep)
    earlier = next((note for note in notes if note.key == job.key), None)
    if earlier is not None:
        return earlier
    if sweep not in folder.parents:
        raise ConfigError(
            f"hydra.sweep.subdir: {folder} is not a folder below {sweep}; each job needs its own folder, "
            "such as hydra.sweep.subdir=${hydra.job.num}"
        )
    for number in itertools.count(1):
        path = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        job = replace(job, folder=str(path.relative_to(sweep)))
        if _take(path, job):
            return job
    raise AssertionError


def _take(path: Path, job: SweepJob) -> bool:
    """Write the job's note into a new or empty folder. Return False where the folder belongs to something else."""
    if path.exists() and not path.is_dir():
        return False
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        return False
    try:
        with open(path / NOTE, "x", encoding="utf-8") as file:  # fails where another job took the folder meanwhile
            json.dump(asdict(job), file)
    except FileExistsError:
        return False
    return True


def clear_folder(path: Path) -> None:
    """Remove the files of a start that saved no checkpoint, because a run cannot be resumed from them.

    Only files that a run writes are removed. Logs and the job's note stay.
    """
    checkpoints = path / "checkpoints"
    files = [file for pattern in (*WRITTEN, *HYDRA_NOTES) for file in path.glob(pattern) if not file.is_dir()]
    for left in [*files, *(left for folder in (path, checkpoints) for left in folder.glob(".tmp-*"))]:
        if left in files or INCOMPLETE.fullmatch(left.name):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    for folder in (checkpoints, path / ".hydra"):
        with contextlib.suppress(OSError):  # missing, or it has other files
            folder.rmdir()
