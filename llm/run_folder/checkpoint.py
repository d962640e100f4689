"""Saves, finds and loads checkpoints, which survive a kill at any moment and are verified before use.

A checkpoint is a folder of three files. `model.safetensors` has the weights. `training.pt` has optimizer, counters and
random states as plain data. `manifest.json` has the SHA-256 and size of each file, the step and the versions, and is
written last. The folder gets its name by one rename, so a folder of that name is complete.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm.errors import CheckpointError
from llm.run_folder.atomic_files import use_default_mode
from llm.run_folder.checkpoint_files import MODEL, TRAINING, list_checkpoints, publish, read_manifest, verify
from llm.run_folder.plain import map_tensors, plain, tensors_in

_MAX_LISTED = 8  # names per error message


class FoundCheckpoint(NamedTuple):
    """The newest valid checkpoint, and the newer ones that were skipped, each with the reason."""

    path: Path
    step: int
    skipped: list[str]


def save_checkpoint(
    folder: Path,
    *,
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> None:
    """Write a complete checkpoint to `folder`, or change nothing.

    Args:
        folder: its final name. An older checkpoint of that name is replaced.
        model_state: weights by name. Names that share one tensor (tied weights) are stored once.
        training_state: everything else, made of tensors, numbers, strings, lists and dicts.
        manifest: entries of manifest.json besides the files (step, world_size, versions, config_hash).

    Raises:
        CheckpointError: the disk is full, or a part of `training_state` is not plain data.
    """
    write_contents(folder, contents_of(model_state, training_state), manifest=manifest)


class Contents(NamedTuple):
    """The contents of a checkpoint in the form in which they are written."""

    tensors: dict[str, Tensor]
    tied: dict[str, str]
    training: Any


def contents_of(
    model_state: Mapping[str, Tensor], training_state: Mapping[str, Any], *, is_copy: bool = False
) -> Contents:
    """Return the contents of a checkpoint.

    Args:
        model_state: weights by name.
        training_state: everything else.
        is_copy: whether to copy tensors to the CPU, so that the contents stay the same while training continues.

    Raises:
        CheckpointError: a part of `training_state` is not plain data.
    """
    tensors, tied = _untie(model_state)
    training = plain(training_state)
    if is_copy:
        tensors = {name: _copied(tensor) for name, tensor in tensors.items()}
        training = map_tensors(training, _copied)
    return Contents(tensors, tied, training)


def write_contents(folder: Path, contents: Contents, *, manifest: Mapping[str, Any]) -> None:
    """Write contents to `folder` as a complete checkpoint, or change nothing."""
    tensors, tied, training = contents
    needed = sum(t.numel() * t.element_size() for t in [*tensors.values(), *tensors_in(training)])
    with publish(folder, manifest=dict(manifest) | {"tied": tied}, needed=needed) as temporary:
        save_file(tensors, str(temporary / MODEL), metadata={"format": "pt"})
        use_default_mode(temporary / MODEL)
        with open(temporary / TRAINING, "wb") as file:
            torch.save(training, file)


def load_model(folder: Path, *, check: bool = True) -> dict[str, Tensor]:
    """Return the weights of a checkpoint on the CPU. Tied names share one tensor again.

    Raises:
        CheckpointError: the checkpoint is missing or corrupt, or a weight is not finite.
    """
    manifest = _trusted(folder, check=check)
    try:
        with safe_open(folder / MODEL, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    except (OSError, SafetensorError) as error:
        raise _unusable(folder, f"{MODEL} cannot be read ({error})") from error
    if bad := names_not_finite(state):
        raise _unusable(folder, f"{bad} has values that are not finite")
    return state | {name: state[stored] for name, stored in manifest.get("tied", {}).items()}


def load_training(folder: Path, *, check: bool = True) -> dict[str, Any]:
    """Return everything except the weights. The file is read as plain data, so no code in it is ever run.

    Raises:
        CheckpointError: the checkpoint is missing or corrupt, or has something other than plain data.
    """
    _trusted(folder, check=check)
    try:
        return torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own message advises to load the file unsafely
        raise _unusable(folder, f"{TRAINING} is not plain data written by this project") from error


def find_last(run_folder: Path, *, key: str = "resume") -> FoundCheckpoint:
    """Return the newest valid checkpoint of a run, and the newer ones that were skipped.

    Args:
        run_folder: the run folder.
        key: the setting that names the folder, for messages.

    Raises:
        CheckpointError: the run has no valid checkpoint.
    """
    checkpoints, skipped = Path(run_folder) / "checkpoints", []
    for step, folder in reversed(list_checkpoints(checkpoints)):
        problems = verify(folder)
        if not problems:
            return FoundCheckpoint(folder, step, skipped)
        skipped.append(f"{folder.name}: {'; '.join(problems)}")
    if skipped:
        raise CheckpointError(
            f"{key}={run_folder}: every checkpoint of this run is incomplete or corrupt ({' | '.join(skipped)}); "
            "restore one from a copy, or start a new run"
        )
    raise CheckpointError(f"{key}={run_folder}: has no checkpoint; name the folder of a run that saved one")


def compare_state(model_state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse the weights of another architecture, and name each weight that differs.

    Args:
        model_state: the checkpoint's weights.
        expected: the model's own `state_dict()`.
        source: the setting that named the checkpoint, as `key=path`, for the message.

    Raises:
        CheckpointError: a weight is missing, unexpected, or of another shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model_state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    lines = [f"{name}: missing, the model has {wanted[name]}" for name in wanted.keys() - shapes.keys()]
    lines += [f"{name}: {shapes[name]}, not in the model" for name in shapes.keys() - wanted.keys()]
    both = shapes.keys() & wanted.keys()
    lines += [f"{n}: {shapes[n]}, the model has {wanted[n]}" for n in both if shapes[n] != wanted[n]]
    if lines:
        listed = "\n  ".join(sorted(lines)[:_MAX_LISTED])
        more = f"\n  and {len(lines) - _MAX_LISTED} more" if len(lines) > _MAX_LISTED else ""
        raise CheckpointError(
            f"{source}: saved by another architecture, {len(lines)} weights differ; "
            f"use the model settings of that run's config.yaml:\n  {listed}{more}"
        )


def _untie(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights to store, and for each tied name the name under which its tensor is stored."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach()
        same = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and same in first:
            tied[name] = first[same]
            continue
        first[same] = name
        storage = tensor.untyped_storage().data_ptr()
        # different views into one storage must be stored as separate tensors
        stored[name] = tensor.clone().contiguous() if storage in storages else tensor.contiguous()
        storages.add(storage)
    return stored, tied


def names_not_finite(state: Mapping[str, Tensor]) -> str:
    """Return the first names of tensors with NaN or infinity, `""` where there is none."""
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    return ", ".join(bad[:_MAX_LISTED])


def _copied(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True)


def _trusted(folder: Path, *, check: bool) -> dict[str, Any]:
    problems = verify(folder) if check else []
    if problems:
        raise _unusable(folder, "; ".join(problems))
    return read_manifest(folder) or {}


def _unusable(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint={folder}: {reason}; use another checkpoint of that run (resume=<run folder> takes the newest "
        "valid one), or restore this one from a copy"
    )
