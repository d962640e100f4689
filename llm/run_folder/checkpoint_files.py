"""Publishes a folder by one rename, with a manifest that proves later that each byte is unchanged."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm.errors import CheckpointError
from llm.run_folder.atomic_files import read_object, temporary_path
from llm.run_folder.full_disk import FULL, REMEDY, refusal_cause

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS_ONLY = "weights_only"
"""Entry of a manifest that says how weights without a training state were made."""
MODEL, TRAINING = "model.safetensors", "training.pt"
_STEP = re.compile(r"step-(\d{8,})")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint made after `step` optimizer updates."""
    return checkpoints / f"step-{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of each checkpoint in the order of steps, including corrupt ones."""
    found = [(re.fullmatch(_STEP, path.name), path) for path in checkpoints.glob("step-*") if not path.is_symlink()]
    return sorted((int(match[1]), path) for match, path in found if match)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint. It loses its name first, so a kill never leaves a partial checkpoint under that name.

    A folder without a manifest is no checkpoint of a run and stays. So does a folder with other files, without its
    checkpoint.
    """
    if not (folder / MANIFEST).is_file():
        return
    own = {folder / name for name in (MODEL, TRAINING, MANIFEST)}
    if {*folder.rglob("*")} <= own:
        doomed = temporary_path(folder, "old-")
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        return
    log.warning("%s: only the checkpoint in it was removed, because the folder has other files", folder)
    for path in sorted(own):  # the manifest first, without which there is no checkpoint
        path.unlink(missing_ok=True)


def point(link: Path, target: Path) -> None:
    """Make `link` a relative symlink to its sibling `target` in one step, so that the link is valid at any moment.

    A file or folder of that name that is no link to a checkpoint stays as it is.
    """
    if os.path.lexists(link) and not (link.is_symlink() and _STEP.fullmatch(os.readlink(link))):
        log.warning("%s: not updated, because it is not a link of this run", link)
        return
    temporary = temporary_path(link)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)


@contextlib.contextmanager
def publish(folder: Path, *, manifest: Mapping[str, Any], needed: int) -> Iterator[Path]:
    """Yield a temporary folder to write files into, and rename it to `folder` at the end.

    Args:
        folder: the final name.
        manifest: entries for manifest.json. The hashes of the files are added.
        needed: bytes that will be written, which are compared with the free space first.

    Raises:
        CheckpointError: the disk or quota is full, or a file-size limit is reached.
    """
    temporary = temporary_path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(folder.parent).free):
        raise _refused(folder, FULL, needed, free)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _write_manifest(temporary, manifest)
        _swap_in(temporary, folder)
    except Exception as error:
        cause = refusal_cause(error)
        if cause is None:
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        raise _refused(folder, cause, needed, shutil.disk_usage(folder.parent).free) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def verify(folder: Path) -> list[str]:
    """Return the problems of a checkpoint, `[]` where every byte is as it was written."""
    if not folder.is_dir():
        return ["is not a folder"] if folder.exists() else ["does not exist"]
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{MANIFEST} is missing or corrupt"]
    if manifest.get("format") != FORMAT or not isinstance(files := manifest.get("files"), dict) or not files:
        return [f"{MANIFEST} is not of format {FORMAT}"]
    problems = [_file_problem(folder, name, entry) for name, entry in files.items()]
    return [problem for problem in problems if problem]


def _write_manifest(temporary: Path, manifest: Mapping[str, Any]) -> None:
    files = {}
    for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
        _fsync(path)
        files[path.relative_to(temporary).as_posix()] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
    with open(temporary / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **manifest, "files": files}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _fsync(temporary)


def _swap_in(temporary: Path, folder: Path) -> None:
    """Rename the complete folder to its final name, and remove an older checkpoint of that name before.

    An older folder that has other files is renamed as well, so that they stay.
    """
    remove_checkpoint(folder)
    if folder.exists():
        names = (folder.with_name(f"{folder.name}.other-files-{n}") for n in itertools.count(1))
        os.rename(folder, next(name for name in names if not name.exists()))
    os.rename(temporary, folder)
    _fsync(folder.parent)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return manifest.json, None where it is missing or corrupt."""
    return read_object(folder / MANIFEST)


def _file_problem(folder: Path, name: str, entry: Any) -> str | None:
    """Return the problem of one file of the manifest, None where it has none."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(entry, dict):
        return f"{MANIFEST} names the file {name!r}, which cannot be part of a checkpoint"
    if not path.is_file():
        return f"{name} is missing"
    if (size := path.stat().st_size) != entry.get("bytes"):
        return f"{name} is empty" if size == 0 else f"{name} has {size} of {entry.get('bytes')} bytes"
    return None if _sha256(path) == entry.get("sha256") else f"{name} differs from its sha256"


def _refused(folder: Path, cause: str, needed: int, free: int) -> CheckpointError:
    return CheckpointError(
        f"checkpoint={folder}: {cause}, {needed:,} bytes needed and {free:,} free; "
        f"{REMEDY[cause]} and resume; earlier checkpoints are unchanged"
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
