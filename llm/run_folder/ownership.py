"""Protects files that a run did not make: names that a run writes, and removal of only what this process added."""

import contextlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from llm.errors import ConfigError

WRITTEN = (
    "config.yaml",
    "summary.json",
    "metrics.jsonl",
    "optimizer.txt",
    "samples.txt",
    "curves.png",
    "expert_load.png",
    "plan.txt",
    "bad_steps.jsonl",
    "rollbacks.json",
    "tokenizer.json",
    "wandb_run_id.txt",
    "run.lock",
    "eval/*.jsonl",
    "csv/version_*/*",
    "tensorboard/events.out.tfevents.*",
    "tensorboard/hparams.yaml",
)
"""Files of a run folder that a run replaces or extends, as patterns. Checkpoints and logs are not included."""
INCOMPLETE = re.compile(
    rf"\.tmp-(?:claim|(?:probe|(?:old-)?step-\d{{8,}}|best|last|job\.json|{'|'.join(map(re.escape, WRITTEN))})-\d+)"
)
"""Names of files and folders that a run leaves behind when it is killed while it writes them."""
HYDRA_NOTES = (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml")
"""Files that Hydra writes into the folder of a run before the run starts."""

_before: dict[Path, frozenset[Path]] = {}
"""Per remembered folder that existed, all its files and folders."""
_siblings: dict[Path, frozenset[Path]] = {}
"""Per parent of a remembered folder that did not exist, the parent's files and folders."""


def refuse_occupied(folder: Path, names: Iterable[str] = WRITTEN) -> None:
    """Refuse a folder for a new run that has files which the run would replace.

    Raises:
        ConfigError: the folder has such files. The message names them.
    """
    found = sorted(str(path.relative_to(folder)) for name in names for path in folder.glob(name))
    if found:
        raise ConfigError(
            f"hydra.run.dir={folder}: has {', '.join(found[:4])}{' …' * (len(found) > 4)}, which a new run would "
            "replace; choose another folder"
        )


def remember_contents(folder: Path) -> None:
    """Record the contents of a folder before this process writes to it, so that `discard_empty` keeps them.

    A folder that does not exist may get another name with a later time stamp. Its parent's contents are recorded then.
    """
    folder = folder.absolute()
    if folder.exists():
        inside = {Path(parent, name) for parent, dirs, files in os.walk(folder) for name in (*dirs, *files)}
        _before.setdefault(folder, frozenset({folder, *inside}))
    else:
        _siblings.setdefault(folder.parent, frozenset(folder.parent.glob("*")))


def _contents_before(folder: Path) -> frozenset[Path] | None:
    """Return what a folder had when it was remembered, None where it is unknown."""
    for root in (folder, *folder.parents):
        if root in _before:
            return _before[root]
        if root.parent in _siblings and root not in _siblings[root.parent]:
            return frozenset()
    return None


def discard_empty(folder: Path) -> None:
    """Remove Hydra's notes and the log files that this process added to a folder in which no run started.

    Do nothing where the folder has any other new file. Without a call of `remember_contents` for the folder or for one
    of its parents nothing is removed, because a file's origin is then unknown.
    """
    folder = folder.absolute()
    before = _contents_before(folder)
    if before is None:
        return
    found = {Path(parent, name) for parent, _, names in os.walk(folder) for name in names}  # tolerates other ranks
    new = found - before
    notes = {folder / name for name in HYDRA_NOTES}
    if any(path not in notes and not (path.suffix == ".log" and path.parent == folder) for path in new):
        return
    _close_logs(folder)
    for path in new:
        path.unlink(missing_ok=True)
    for path in sorted((Path(parent) for parent, _, _ in os.walk(folder)), reverse=True):  # children first
        if path not in before:
            with contextlib.suppress(OSError):  # not empty, or already removed
                path.rmdir()


def _close_logs(folder: Path) -> None:
    """Close the log files in a folder. An open log handler would create its file again."""
    for handler in [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]:
        if Path(handler.baseFilename).is_relative_to(folder):
            logging.getLogger().removeHandler(handler)
            handler.close()
