"""Chooses the folder of a job, and clears it before a job without a checkpoint starts again."""

import shutil
from dataclasses import replace
from pathlib import Path

from llm.sweep.manifest import NOTE, SweepJob, read_notes

KEPT = (NOTE, ".hydra")
"""Names that stay in the folder of a job that starts again, besides its logs."""


def claim_folder(sweep: Path, overrides: tuple[str, ...], folder: Path) -> SweepJob:
    """Return the job as an earlier start recorded it, or a new job with a folder that no other job uses."""
    job = SweepJob(overrides=overrides)
    notes = read_notes(sweep)
    earlier = next((note for note in notes if note.key == job.key), None)
    if earlier is not None:
        return earlier
    taken = {note.folder for note in notes}
    names = (folder.with_name(f"{folder.name}{suffix}") for suffix in ["", *(f"-{n}" for n in range(2, 10_000))])
    path = next(name for name in names if str(name.relative_to(sweep)) not in taken)
    path.mkdir(parents=True, exist_ok=True)
    return replace(job, folder=str(path.relative_to(sweep)))


def clear_folder(path: Path) -> None:
    """Remove the files of a start that saved no checkpoint, because a run cannot be resumed from them."""
    for left in path.iterdir():
        if left.name in KEPT or left.suffix == ".log":
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()
