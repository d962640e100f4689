"""Muon on flat shards: momenta stay sharded, and each matrix is orthogonalised on the rank that owns it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm.optim.blocks import as_blocks, block_shape, from_blocks, move_piece
from llm.optim.exchange import OwnerExchange
from llm.optim.grouped_optimizer import CHUNK
from llm.optim.hyperball import turn_shard
from llm.optim.newton_schulz import orthogonalize
from llm.optim.row_normalization import balance_rows
from llm.optim.shard import ShardLayout


def make_exchange(layout: ShardLayout) -> OwnerExchange:
    """Return an exchange that chooses the owner of each matrix by the cost of its Newton-Schulz iteration."""
    return OwnerExchange(layout, cost=iteration_cost)


def iteration_cost(shape: tuple[int, ...]) -> float:
    """Return the multiplications of one Newton-Schulz step: per expert, the smaller side squared times the larger."""
    rows, columns = shape[-2:]
    return float(min(rows, columns) ** 2 * max(rows, columns) * torch.Size(shape[:-2]).numel())


def direction_of(
    name: str,
    whole: Tensor,
    *,
    heads: int,
    iteration: str,
    dtype: torch.dtype,
    row_beta: float | None,
    owned_state: dict[str, dict[str, Tensor]],
) -> Tensor:
    """Return one matrix orthogonalised; NorMuon's row moments are stored on its owner."""
    blocks = as_blocks(whole, heads)[None]
    directions = orthogonalize(blocks, iteration=iteration, dtype=dtype)
    if row_beta is not None:
        held = owned_state.setdefault(name, {})
        if "row_moment" not in held:
            held["row_moment"] = torch.zeros(*blocks.shape[1:-1], 1, device=whole.device)
        held["row_moment"] = held["row_moment"].to(whole.device)
        directions = balance_rows(directions.float(), [held["row_moment"]], beta=row_beta)
    return from_blocks(directions[0], heads, tuple(whole.shape))


def active_experts(gradient: Tensor, layout: ShardLayout) -> Tensor | None:
    """Return a mask of the elements of experts with a nonzero gradient on any rank, or None if all have one.

    A batch uses every matrix that is no stack of experts. Without stacks, ranks therefore exchange nothing.
    """
    sizes = {name: torch.Size(shape[-2:]).numel() for name, shape in layout.shapes.items() if len(shape) == 3}
    return layout.active_elements(gradient, sizes) if sizes else None


def descend_shard(
    flat: Tensor,
    directions: Tensor,
    layout: ShardLayout,
    *,
    heads: Mapping[str, int],
    active: Tensor | None,
    group: Mapping[str, Any],
    update_scale: Callable[[int, int], float],
    cautious: bool,
) -> None:
    """Apply W ← W − lr·(scale·O + λ·W) to the active elements, in cache-sized pieces."""
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    for held in layout.slices:
        step = lr * update_scale(*block_shape(held.shape, heads[held.name]))
        parts = [held.of(t).split(CHUNK) for t in (flat, directions, *([] if active is None else [active]))]
        for piece, direction, *masks in zip(*parts, strict=True):
            used = masks[0].float() if masks else None
            move_piece(piece, direction, used, decay=lr * decay, step=step, cautious=cautious)


def update_matrix_shard(
    flat: Tensor,
    ahead: Tensor,
    gradient: Tensor,
    layout: ShardLayout,
    exchange: OwnerExchange,
    *,
    heads: Mapping[str, int],
    group: Mapping[str, Any],
    muon: Any,
    dtype: torch.dtype,
) -> None:
    """Orthogonalise `ahead` on the owner ranks, and update the shard with the result.

    Args:
        flat: the shard of weights.
        ahead: values to orthogonalise, with the layout of the shard.
        gradient: gradients with the layout of the shard; they show which blocks were used.
        layout: layout of the shard.
        exchange: exchange of the layout.
        heads: heads of each tensor, in the convention of `as_blocks`.
        group: parameter group with `lr` and `weight_decay`.
        muon: optimizer whose settings are used.
        dtype: dtype of the products.
    """
    settings = {"iteration": muon.iteration, "dtype": dtype, "row_beta": muon.row_beta}
    work = partial(direction_of, owned_state=muon.owned_state, **settings)
    directions = exchange.map(
        ahead,
        lambda name, whole: work(name, whole, heads=heads[name]),
        dtype=dtype if muon.row_beta is None else torch.float32,
    )
    active = active_experts(gradient, layout) if muon.skip_idle_rows else None
    if muon.hyperball:
        turn_shard(flat, directions, layout, heads=heads, active=active, lr=float(group["lr"]))
        return
    descend_shard(
        flat,
        directions,
        layout,
        heads=heads,
        active=active,
        group=group,
        update_scale=muon.update_scale,
        cautious=muon.cautious_decay,
    )
