"""Cuts the work of the blocked kernel into tiles: rows and heads that are multiplied together, in head-major order."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm.model.attention.kernels.key_spans import within
from llm.model.attention.kernels.query_blocks import QueryBlock, plan_rows, plan_spans
from llm.model.attention.kernels.reference import visible_keys

QUERY_BLOCK = 128
"""Queries per block: shorter blocks waste fewer products above the diagonal, and longer ones multiply faster."""

SCORE_ELEMENTS = 1 << 20
"""Scores in memory at a time, over the rows and heads of a tile: 4 MiB in fp32, about the cache of one core."""


class Tile(NamedTuple):
    """Consecutive rows and heads that the kernel computes independently of others."""

    rows: slice
    heads: slice
    kv_heads: slice
    blocks: list[QueryBlock]
    document_ids: Int[Tensor, "rows time_k"] | None
    """Ids of each row, or of the first row alone where all rows have the same document starts."""
    window: int | None
    spans: Int[Tensor, "rows time bounds"] | None
    """Keys that each query sees, where attention is not causal; see `key_spans`."""
    num_scores: int
    """Number of scores of the largest block."""

    @property
    def group(self) -> int:
        """Number of query heads that share a key/value head."""
        return (self.heads.stop - self.heads.start) // (self.kv_heads.stop - self.kv_heads.start)

    def queries(self, x: Float[Tensor, "batch time heads dim"]) -> Float[Tensor, "tile_heads group time dim"]:
        """Return the tile's part of a tensor that has query heads, head by head."""
        return x[self.rows, :, self.heads].transpose(1, 2).contiguous().unflatten(1, (-1, self.group)).flatten(0, 1)

    def keys(self, x: Float[Tensor, "batch time_k kv_heads dim"]) -> Float[Tensor, "tile_heads time_k dim"]:
        """Return the tile's part of a tensor that has key/value heads, head by head."""
        return x[self.rows, :, self.kv_heads].transpose(1, 2).contiguous().flatten(0, 1)

    def visible(self, block: QueryBlock) -> Bool[Tensor, "rows queries keys"] | None:
        """Return which keys of a block its queries see; None where they see all of them."""
        if self.spans is not None:
            return within(self.spans[:, block.start : block.stop], block.pieces) if block.is_masked else None
        ids = self.document_ids if block.is_masked else None
        return visible_keys(
            time=block.stop - block.start,
            time_k=block.key_stop - block.key_start,
            device=torch.device("cpu") if self.document_ids is None else self.document_ids.device,
            document_ids=None if ids is None else ids[:, block.key_start : block.key_stop],
            window=self.window if block.is_masked else None,
        )

    def write_queries(self, target: Tensor, block: QueryBlock, value: Float[Tensor, "tile_heads rows dim"]) -> None:
        """Write the result of a block, [tile_heads, group · queries, dim], to a tensor that has query heads."""
        part = target[self.rows, block.start : block.stop, self.heads].transpose(1, 2)
        part.copy_(value.view(part.shape))

    def write_keys(self, target: Tensor, value: Float[Tensor, "tile_heads time_k dim"]) -> None:
        """Write a result for all keys to a tensor that has key/value heads."""
        part = target[self.rows, :, self.kv_heads].transpose(1, 2)
        part.copy_(value.view(part.shape))


def take(x: Float[Tensor, "tile_heads group time dim"], block: QueryBlock) -> Float[Tensor, "tile_heads rows dim"]:
    """Return the queries of a block, concatenated over the heads of a group."""
    return x[:, :, block.start : block.stop].flatten(1, 2)


def tiles(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch time_k kv_heads head_dim"],
    document_ids: Int[Tensor, "batch time_k"] | None,
    window: int | None,
    spans: Int[Tensor, "rows time bounds"] | None = None,
) -> Iterator[Tile]:
    """Yield tiles of at most SCORE_ELEMENTS scores, or of one row and one key/value head."""
    (batch, time, heads, _), (time_k, kv_heads) = q.shape, k.shape[1:3]
    group = heads // kv_heads
    block = max(1, QUERY_BLOCK // group)
    if spans is None:
        plans = plan_rows(document_ids, batch=batch, time=time, time_k=time_k, window=window, block=block)
    else:
        plans = plan_spans(spans, batch=batch, time_k=time_k, block=block)
    for rows, blocks, is_uniform in plans:
        largest = max((b.stop - b.start) * b.num_keys for b in blocks) * group
        heads_at_once = min(kv_heads, max(1, SCORE_ELEMENTS // largest))
        rows_at_once = max(1, SCORE_ELEMENTS // (largest * kv_heads))
        for run in _runs(rows, rows_at_once):
            own = slice(run.start, run.start + 1 if is_uniform else run.stop)
            ids = None if document_ids is None else document_ids[own]
            seen = spans if spans is None or len(spans) == 1 else spans[own]
            for head in range(0, kv_heads, heads_at_once):
                stop = min(head + heads_at_once, kv_heads)
                size = largest * (run.stop - run.start) * (stop - head)
                yield Tile(run, slice(head * group, stop * group), slice(head, stop), blocks, ids, window, seen, size)


def _runs(rows: list[int], longest: int) -> Iterator[slice]:
    """Cut ascending row numbers into slices of consecutive ones."""
    start = previous = rows[0]
    for row in [*rows[1:], None]:
        if row is None or row != previous + 1 or row - start >= longest:
            yield slice(start, previous + 1)
            start = row if row is not None else start
        previous = row if row is not None else previous
