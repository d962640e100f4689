"""Reads the whole shapes of a model's parameters under ZeRO, and refreshes its parts after loading."""

from typing import Any

import torch
from torch import Tensor, nn


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return a parameter's whole shape, also where stage 3 has split it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether ZeRO stage 3 manages a tensor, so that a rank may have a part of it alone."""
    return hasattr(tensor, "ds_shape")


def state_shapes(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict as tensors with whole shapes and no storage, for comparison."""
    return {name: torch.empty(whole_shape(t), device="meta") for name, t in module.state_dict(keep_vars=True).items()}


@torch.no_grad()
def refresh_parts(zero: Any) -> None:
    """Update stage 3's parameters from its fp32 shards after anything except a step has written them."""
    for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
        zero.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
        zero._unflatten_partitioned_parameters(index)
    if zero.persistent_parameters:  # small ones stay whole on every rank
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
