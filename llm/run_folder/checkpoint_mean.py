"""Averages the weights of several checkpoints, which is often better than the last one and costs no training."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from llm.errors import CheckpointError, ConfigError
from llm.run_folder.checkpoint import compare_state, load_model
from llm.run_folder.checkpoint_files import list_checkpoints


def last_checkpoints(run_folder: Path, folder: Path, count: int) -> list[Path]:
    """Return `folder`, a checkpoint of the run, and the count − 1 checkpoints before it.

    Raises:
        ConfigError: the count is below 1.
        CheckpointError: the run kept fewer checkpoints.
    """
    if count < 1:
        raise ConfigError(f"average={count}: must be at least 1, which means this checkpoint alone; try 5")
    if count == 1:
        return [folder]
    folders = [path.resolve() for _, path in list_checkpoints(run_folder / "checkpoints")]
    upto = folders[: folders.index(folder) + 1] if folder in folders else []
    if len(upto) < count:
        raise CheckpointError(
            f"average={count}: {run_folder / 'checkpoints'} has only {len(upto)} checkpoints up to {folder.name}; "
            "lower it, or train with callbacks.checkpoints.keep above it"
        )
    return upto[-count:]


def mean_state(folders: Sequence[Path]) -> dict[str, Tensor]:
    """Return the mean of the weights of several checkpoints, computed in fp64.

    Counters and flags are those of the last checkpoint.

    Source: Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging",
    arXiv:2209.14981, section 2.
    """
    last = load_model(folders[-1])
    if len(folders) == 1:
        return last
    sums = {name: tensor.double() for name, tensor in last.items() if tensor.is_floating_point()}
    for folder in folders[:-1]:
        state = load_model(folder)
        compare_state(state, last, source=f"average={len(folders)}")
        for name, total in sums.items():
            total += state[name]
    means = {name: (total / len(folders)).to(last[name].dtype) for name, total in sums.items()}
    return last | means | _tied(last, means)


def _tied(state: dict[str, Tensor], means: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the means with one shared tensor for names that share one tensor in `state`."""
    first: dict[int, str] = {}
    shared: dict[str, Tensor] = {}
    for name in means:
        key = state[name].data_ptr() if state[name].numel() else id(state[name])
        shared[name] = means[first.setdefault(key, name)]
    return shared
