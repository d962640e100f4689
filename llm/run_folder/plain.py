"""Converts state to plain data, which can be stored in a file and loaded without running code."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from llm.errors import CheckpointError


def plain(value: Any, *, where: str = "training state") -> Any:
    """Return `value` in types that can be loaded without running code.

    Raises:
        CheckpointError: a part has no plain form. The message names the part.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {plain(key, where=where): plain(inner, where=f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        inner = [plain(item, where=f"{where}[{index}]") for index, item in enumerate(value)]
        return inner if isinstance(value, list) else tuple(inner)
    if value is None or isinstance(value, bool | bytes | torch.Size | torch.dtype | torch.device):
        return value
    for kind in (int, float, str):  # subclasses such as NumPy's float64 and enums would be stored as code
        if isinstance(value, kind):
            return kind(value)
    raise CheckpointError(
        f"{where}: {type(value).__name__} cannot be stored in a checkpoint; make it a tensor or a string"
    )


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return plain data with each tensor replaced by the result of `function`."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(inner, function) for key, inner in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(map_tensors(inner, function) for inner in value)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in plain data."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(inner)
