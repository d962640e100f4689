"""Gathers the weights and optimizer state of flat shards by parameter name to save, and scatters them to load.

A checkpoint of ZeRO's shards therefore equals that of a single process, and any stage with any number of ranks can read
it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.contracts import ShardedOptimizer
from llm.optim.checks import check_names
from llm.optim.shard import ShardLayout

GATHERED_AT_ONCE = 1 << 24
"""Elements that the first rank receives at a time, from all ranks together: 64 MB in fp32."""


def gather_flat(flat: Tensor, layout: ShardLayout) -> list[Tensor]:
    """Return every rank's shard on the CPU of the group's first rank, and nothing on other ranks."""
    if len(layout.table) == 1:
        return [flat.detach().cpu()]
    first, ranks = layout.rank == 0, range(len(layout.table))
    whole = [torch.empty(flat.shape, dtype=flat.dtype) for _ in ranks] if first else []
    each = max(1, GATHERED_AT_ONCE // len(ranks))
    for start in range(0, flat.numel(), each):
        part = flat.detach()[start : start + each].to(layout.comm_device).contiguous()
        parts = [torch.empty_like(part) for _ in ranks] if first else None
        target = 0 if layout.group is None else dist.get_global_rank(layout.group, 0)
        dist.gather(part, parts, dst=target, group=layout.group)
        for shard, arrived in zip(whole, parts or [], strict=bool(first)):
            shard[start : start + part.numel()].copy_(arrived)
    return whole


def gather_whole(flat: Tensor, layout: ShardLayout) -> dict[str, Tensor]:
    """Return the whole tensors of a shard by name on the CPU of the group's first rank, and nothing on others."""
    shards = gather_flat(flat, layout)
    if not shards:
        return {}
    whole = {name: torch.empty(torch.Size(shape).numel(), dtype=flat.dtype) for name, shape in layout.shapes.items()}
    for shard, rows in zip(shards, layout.table, strict=True):
        for piece in rows:
            whole[piece.name].narrow(0, piece.start, piece.numel).copy_(piece.of(shard))
    return {name: tensor.view(layout.shapes[name]) for name, tensor in whole.items()}


@torch.no_grad()
def scatter_whole(flat: Tensor, layout: ShardLayout, whole_of: Callable[[str], Tensor]) -> None:
    """Copy this rank's slices of whole tensors into its shard."""
    for piece in layout.slices:
        whole = whole_of(piece.name)
        piece.of(flat).copy_(whole.reshape(-1).narrow(0, piece.start, piece.numel))


def gather_optimizer_state(
    optimizer: torch.optim.Optimizer, layouts: Sequence[ShardLayout]
) -> dict[str, dict[str, Any]]:
    """Return the optimizer's state by parameter name, on the first rank; elsewhere nothing."""
    state: dict[str, dict[str, Any]] = {}
    for layout in layouts:
        held = optimizer.state.get(layout.flat, {})
        for key, value in held.items():
            if isinstance(value, Tensor) and value.shape == layout.flat.shape:
                for name, whole in gather_whole(value, layout).items():
                    state.setdefault(name, {})[key] = whole
            elif layout.rank == 0:
                for name in layout.shapes:
                    state.setdefault(name, {})[key] = value.cpu().clone() if isinstance(value, Tensor) else value
    for name, held in _gather_owned(optimizer).items():
        state.setdefault(name, {}).update(held)
    return state


def _gather_owned(optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """Merge the ranks' state of whole tensors."""
    held_here = optimizer.owned_state if isinstance(optimizer, ShardedOptimizer) else {}
    own = {name: {key: value.cpu() for key, value in held.items()} for name, held in held_here.items()}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return {name: held for part in ranks for name, held in part.items()}


def optimizer_state_dict(groups: Sequence[Mapping[str, Any]], state: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the result of `torch.optim.Optimizer.state_dict` as if the parameters were not sharded."""
    saved, packed, index = [], {}, 0
    for group in groups:
        names = group["names"]
        indices = list(range(index, index + len(names)))
        index += len(names)
        saved.append({key: value for key, value in group.items() if key != "params"} | {"params": indices})
        packed |= {i: dict(state[name]) for i, name in zip(indices, names, strict=True) if name in state}
    return {"state": packed, "param_groups": saved}


def state_by_name(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a saved optimizer state by parameter name, and set the groups' settings from it.

    Raises:
        CheckpointError: the state belongs to other parameters.
    """
    saved = check_names(groups, state_dict)
    for group, old in zip(groups, state_dict["param_groups"], strict=True):
        group.update({k: v for k, v in old.items() if k not in ("params", "names")})  # type: ignore[attr-defined]
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    return {
        name: state_dict["state"][index]
        for name, index in zip(saved, indices, strict=True)
        if index in state_dict["state"]
    }


@torch.no_grad()
def scatter_optimizer_state(
    optimizer: Any, layouts: Sequence[ShardLayout], state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Split a state by parameter name into this rank's shards."""
    owned: dict[str, dict[str, Tensor]] = {}
    for layout in layouts:
        held: dict[str, Any] = {}
        for name, shape in layout.shapes.items():
            for key, value in state.get(name, {}).items():
                if isinstance(value, Tensor) and tuple(value.shape) == shape and value.ndim:
                    held.setdefault(key, torch.zeros_like(layout.flat, dtype=torch.float32))
                elif key == "step":
                    held[key] = value.clone() if isinstance(value, Tensor) else value
                else:
                    owned.setdefault(name, {})[key] = torch.as_tensor(value)
        for key, buffer in held.items():
            if isinstance(buffer, Tensor) and buffer.shape == layout.flat.shape:
                scatter_whole(buffer, layout, partial(_whole, state, key, layout.shapes))
        if held:
            optimizer.state[layout.flat] = held
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.load_owned_state(owned)


def _whole(
    state: Mapping[str, Mapping[str, Any]], key: str, shapes: Mapping[str, tuple[int, ...]], name: str
) -> Tensor:
    value = state.get(name, {}).get(key)
    return torch.zeros(shapes[name]) if value is None else value
