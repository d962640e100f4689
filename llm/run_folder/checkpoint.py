"""Checkpoints that survive a kill at any moment and are never half-believed.

A checkpoint is a folder: `model.safetensors` (weights alone), `training.pt` (optimizer, counters, random states;
plain data only) and `manifest.json` (sha256 and size of each file, step, versions; written last). It appears under its
name by one rename, so a folder that has the name is whole, and the manifest proves it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm.errors import CheckpointError
from llm.run_folder.checkpoint_files import list_checkpoints, publish, read_manifest, verify
from llm.run_folder.plain import map_tensors, plain, tensors_in

MODEL, TRAINING = "model.safetensors", "training.pt"
_SEVERAL = 8  # names listed in one error


class FoundCheckpoint(NamedTuple):
    """The newest checkpoint that can be trusted, and why newer ones were not."""

    path: Path
    step: int
    passed_over: list[str]


def save_checkpoint(
    folder: Path,
    *,
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> None:
    """Write a whole checkpoint to `folder`, or leave everything as it was.

    Args:
        folder: its final name; an older checkpoint of that name is replaced.
        model_state: weights by name; names that share one tensor (tied weights) are stored once.
        training_state: everything else, made of tensors, numbers, texts, lists and dicts.
        manifest: what manifest.json records besides the files (step, world_size, versions, config_hash).

    Raises:
        CheckpointError: the disk is full, or `training_state` holds something that is not plain data.
    """
    write_contents(folder, contents_of(model_state, training_state), manifest=manifest)


class Contents(NamedTuple):
    """What a checkpoint is made of, in the form in which it is written."""

    tensors: dict[str, Tensor]
    tied: dict[str, str]
    training: Any


def contents_of(
    model_state: Mapping[str, Tensor], training_state: Mapping[str, Any], *, is_copy: bool = False
) -> Contents:
    """Return the contents of a checkpoint; a copy stays as it is while training goes on.

    Raises:
        CheckpointError: `training_state` holds something that is not plain data.
    """
    tensors, tied = _untie(model_state)
    training = plain(training_state)
    if is_copy:
        tensors = {name: _copied(tensor) for name, tensor in tensors.items()}
        training = map_tensors(training, _copied)
    return Contents(tensors, tied, training)


def write_contents(folder: Path, contents: Contents, *, manifest: Mapping[str, Any]) -> None:
    """Write a whole checkpoint to `folder`, or leave everything as it was; see `save_checkpoint`."""
    tensors, tied, training = contents
    needed = sum(t.numel() * t.element_size() for t in [*tensors.values(), *tensors_in(training)])
    with publish(folder, manifest=dict(manifest) | {"tied": tied}, needed=needed) as temporary:
        save_file(tensors, str(temporary / MODEL), metadata={"format": "pt"})
        with open(temporary / TRAINING, "wb") as file:
            torch.save(training, file)


def load_model(folder: Path, *, check: bool = True) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, on the CPU, tied names sharing one tensor again.

    Raises:
        CheckpointError: it is missing, damaged, or holds a weight that is not a number.
    """
    manifest = _trusted(folder, check=check)
    try:
        with safe_open(folder / MODEL, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    except (OSError, SafetensorError) as error:
        raise _unusable(folder, f"{MODEL} cannot be read ({error})") from error
    if bad := names_not_finite(state):
        raise _unusable(folder, f"{bad} holds values that are not finite")
    return state | {name: state[stored] for name, stored in manifest.get("tied", {}).items()}


def load_training(folder: Path, *, check: bool = True) -> dict[str, Any]:
    """Return everything but the weights, read as plain data: no code in the file is ever run.

    Raises:
        CheckpointError: it is missing, damaged, or holds something other than plain data.
    """
    _trusted(folder, check=check)
    try:
        return torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    except Exception as error:  # the reasons torch gives advise loading it unsafely
        raise _unusable(folder, f"{TRAINING} is not plain data written by this project") from error


def find_last(run_folder: Path, *, key: str = "resume") -> FoundCheckpoint:
    """Return the newest checkpoint of a run that verifies, and which newer ones were passed over and why.

    Args:
        run_folder: the run's.
        key: the setting that names it, for messages.

    Raises:
        CheckpointError: there is none.
    """
    checkpoints, passed_over = Path(run_folder) / "checkpoints", []
    for step, folder in reversed(list_checkpoints(checkpoints)):
        problems = verify(folder)
        if not problems:
            return FoundCheckpoint(folder, step, passed_over)
        passed_over.append(f"{folder.name}: {'; '.join(problems)}")
    if passed_over:
        raise CheckpointError(
            f"{key}={run_folder}: every checkpoint in it is damaged ({' | '.join(passed_over)}); "
            "restore one from a copy, or start a new run"
        )
    raise CheckpointError(f"{key}={run_folder}: holds no checkpoint; give the folder of a run that saved one")


def compare_state(model_state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse weights that another architecture made, naming each key that differs.

    Args:
        model_state: the checkpoint's weights.
        expected: the model's own `state_dict()`.
        source: the setting that named the checkpoint, as `key=path`, for the message.

    Raises:
        CheckpointError: a key is missing, unexpected, or of another shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model_state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    lines = [f"{name}: missing, the model has {wanted[name]}" for name in wanted.keys() - shapes.keys()]
    lines += [f"{name}: {shapes[name]}, not in the model" for name in shapes.keys() - wanted.keys()]
    both = shapes.keys() & wanted.keys()
    lines += [f"{n}: {shapes[n]}, the model has {wanted[n]}" for n in both if shapes[n] != wanted[n]]
    if lines:
        listed = "\n  ".join(sorted(lines)[:_SEVERAL])
        more = f"\n  and {len(lines) - _SEVERAL} more" if len(lines) > _SEVERAL else ""
        raise CheckpointError(
            f"{source}: made by another architecture, {len(lines)} weights differ; "
            f"use the model settings of that run's config.yaml:\n  {listed}{more}"
        )


def _untie(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split weights into those to store and, for each tied name, the name that it is stored under."""
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
        # views into one storage that are not the same weight have to be stored apart
        stored[name] = tensor.clone().contiguous() if storage in storages else tensor.contiguous()
        storages.add(storage)
    return stored, tied


def names_not_finite(state: Mapping[str, Tensor]) -> str:
    """Return the first names of tensors that hold NaN or infinity, `""` for none."""
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    return ", ".join(bad[:_SEVERAL])


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
        "whole one), or restore this one from a copy"
    )
