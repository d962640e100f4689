"""Tiger on flat shards: ranks exchange sums of squares and flags; weights and momenta stay on their rank."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.optim.grouped_optimizer import CHUNK
from llm.optim.shard import ShardLayout, Span, rows_to_watch, spans, square_sum
from llm.optim.shard_steps import keep_inactive


def broken_tensors(gradient: Tensor, layout: ShardLayout) -> set[str]:
    """Return the names of the tensors whose gradient has a non-finite element on any rank."""
    sizes = {name: max(1, torch.Size(shape).numel()) for name, shape in layout.shapes.items()}
    flags = layout.block_measure(gradient, sizes, _is_broken, dist.ReduceOp.MAX)
    return {name for name, flag in flags.items() if bool(flag.any())}


def shrink(flat: Tensor, layout: ShardLayout, broken: set[str], *, ratio: float, rest: Mapping[str, float]) -> None:
    """Move the slices of `broken` tensors towards their resting values: θ ← rest + ratio·(θ − rest)."""
    for piece in layout.slices:
        if piece.name in broken:
            piece.of(flat).sub_(rest[piece.name]).mul_(ratio).add_(rest[piece.name])


def relative_rates(
    flat: Tensor, layout: ShardLayout, *, kind: str, lr: float, floors: Mapping[str, float]
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return, by tensor, the number of elements per block and η of each block.

    A block is a row of an embedding, an expert of a stack, and the whole tensor otherwise.

    η = lr · max(RMS(block), floor of the tensor)
    """
    sizes = {
        name: shape[-1] if kind == "embedding" else max(1, torch.Size(shape[1:] if len(shape) == 3 else shape).numel())
        for name, shape in layout.shapes.items()
    }
    sums = layout.block_measure(flat, sizes, square_sum, dist.ReduceOp.SUM)
    return sizes, {
        name: (total / sizes[name]).sqrt().clamp_min(floors[name]).mul(lr).to(flat.dtype)
        for name, total in sums.items()
    }


def move_shard_by_sign(
    flat: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    layout: ShardLayout,
    *,
    sizes: Mapping[str, int],
    rates: Mapping[str, Tensor],
    broken: set[str],
    active: Tensor | None,
    beta: float,
    decay: float,
) -> None:
    """Apply m ← β·m + (1−β)·g and θ ← θ − η·(sign(m) + λθ) to each slice of a tensor whose gradient is finite.

    Args:
        flat: the shard of weights.
        momentum: momenta, with the layout of the shard.
        gradient: gradients, with the layout of the shard.
        layout: layout of the shard.
        sizes: number of elements per block with one η, by tensor.
        rates: η of each block, by tensor.
        broken: names of the tensors to skip.
        active: mask of the elements to update; None for all.
        beta: decay rate β of the momentum.
        decay: weight decay λ.
    """
    for piece in layout.slices:
        if piece.name in broken:
            continue
        piece.of(momentum).lerp_(piece.of(gradient), 1 - beta)
        for span in spans(piece, sizes[piece.name]):
            for part, eta in _pieces(span, rates[piece.name]):
                moved, mask = part.of(flat), None if active is None else part.of(active)
                keep_inactive(moved, mask, lambda m=moved, p=part, e=eta: _step(m, p.of(momentum), e, decay))


def _step(weight: Tensor, momentum: Tensor, eta: Tensor, decay: float) -> None:
    if decay:
        weight.mul_(1 - decay * eta)
    weight.sub_(torch.sign(momentum).mul_(eta))


def _pieces(span: Span, rates: Tensor) -> Any:
    """Yield pieces of a span that fit the cache, each with the η of its blocks as a column."""
    width = span.length // span.num_blocks
    if span.num_blocks == 1:
        for start in range(0, span.length, CHUNK):
            length = min(CHUNK, span.length - start)
            yield Span(span.block, 1, span.offset + start, length), rates[span.block]
        return
    rows = max(1, CHUNK // width)
    for first in range(0, span.num_blocks, rows):
        count = min(rows, span.num_blocks - first)
        block = span.block + first
        piece = Span(block, count, span.offset + first * width, count * width)
        yield piece, rates[block : block + count, None]


def watched(layout: ShardLayout, kind: str, gradient: Tensor) -> Tensor | None:
    """Return a mask of the elements whose row has a gradient, or None where all elements are updated."""
    rows = rows_to_watch(layout, kind)
    return layout.active_elements(gradient, rows) if rows else None


def _is_broken(rows: Tensor) -> Tensor:
    return ~torch.isfinite(torch.linalg.vector_norm(rows, ord=float("inf"), dim=1))
