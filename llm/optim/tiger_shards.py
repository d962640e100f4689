"""Tiger on flat shards: sums of squares and flags are agreed on by all ranks, everything else stays where it lies."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.optim.base import CHUNK
from llm.optim.shard import ShardLayout, Span, rows_to_watch, spans, square_sum
from llm.optim.shard_steps import keep_inactive


def broken_tensors(gradient: Tensor, layout: ShardLayout) -> set[str]:
    """Return the tensors whose gradient is not finite somewhere, on any rank."""
    sizes = {name: max(1, torch.Size(shape).numel()) for name, shape in layout.shapes.items()}
    flags = layout.block_measure(gradient, sizes, _is_broken, dist.ReduceOp.MAX)
    return {name for name, flag in flags.items() if bool(flag.any())}


def shrink(flat: Tensor, layout: ShardLayout, broken: set[str], *, ratio: float, rest: Mapping[str, float]) -> None:
    """Move the slices of `broken` tensors towards their resting values: θ ← rest + ratio·(θ − rest)."""
    for piece in layout.slices:
        if piece.name in broken:
            piece.of(flat).sub_(rest[piece.name]).mul_(ratio).add_(rest[piece.name])


def relative_rates(
    flat: Tensor, layout: ShardLayout, *, kind: str, lr: float, min_rms: float
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return elements of a block and η of each block, by tensor: rows for embeddings, else the whole tensor.

    η = lr · max(RMS(block), min_rms)
    """
    sizes = {
        name: shape[-1] if kind == "embedding" else max(1, torch.Size(shape).numel())
        for name, shape in layout.shapes.items()
    }
    sums = layout.block_measure(flat, sizes, square_sum, dist.ReduceOp.SUM)
    return sizes, {
        name: (total / sizes[name]).sqrt().clamp_min(min_rms).mul(lr).to(flat.dtype) for name, total in sums.items()
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
    """m ← β·m + (1−β)·g;  θ ← θ − η·(sign(m) + λθ) on every slice whose tensor is not broken.

    Args:
        flat: the shard of weights.
        momentum: laid out as the shard.
        gradient: likewise.
        layout: of the shard.
        sizes: elements of a block with one η, by tensor.
        rates: η of each block, by tensor.
        broken: tensors to leave alone.
        active: elements that may move; None for all.
        beta: β.
        decay: λ.
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
    """Cut a span into pieces that fit the cache, each with the η of its blocks as a column."""
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
    """Mark the elements of rows that had a gradient; None where all may move."""
    rows = rows_to_watch(layout, kind)
    return layout.active_elements(gradient, rows) if rows else None


def _is_broken(rows: Tensor) -> Tensor:
    return ~torch.isfinite(torch.linalg.vector_norm(rows, ord=float("inf"), dim=1))
