"""Computes the keys that each query sees as one or two spans, for sights other than causal."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llm.contracts import Sight
from llm.errors import ShapeError


def key_spans(
    sight: Sight,
    *,
    time: int,
    time_k: int,
    positions: Int[Tensor, "batch positions"],
    document_ids: Int[Tensor, "batch time_k"] | None,
    window: int | None,
) -> Int[Tensor, "rows time bounds"]:
    """Return the first key and the key after the last one for each query; for `block_pair` two such spans.

    Query i belongs to key time_k − time + i. `rows` is the batch, or 1 where all rows have the same spans.

    Args:
        sight: bidirectional, block or block_pair.
        time: number of queries.
        time_k: number of keys.
        positions: position of each key within its document; read for blocks alone.
        document_ids: document of each key, or None where every row is one document.
        window: under bidirectional, keys at a distance below it are seen; None for all.

    Raises:
        ShapeError: a sight with blocks has fewer queries than keys.
    """
    ids = torch.zeros(1, time_k, dtype=torch.long, device=positions.device) if document_ids is None else document_ids
    if sight.kind == "bidirectional":
        first, last = run_bounds(ids[:, 1:] != ids[:, :-1])
        if window is not None:
            at = torch.arange(time_k, device=ids.device)
            first, last = torch.maximum(first, at - window + 1), torch.minimum(last, at + window)
        return torch.stack([first, last], -1)[:, time_k - time :]
    if time != time_k:
        raise ShapeError(
            f"attention time={time}: sight {sight.kind} reads all {time_k} keys at once; use bidirectional"
        )
    whole = time // 2 if sight.kind == "block_pair" else time
    ids, blocks = ids[:, :whole], positions[:, :whole] // sight.block_length
    new_document = ids[:, 1:] != ids[:, :-1]
    first, _ = run_bounds(new_document)
    block_first, block_last = run_bounds(new_document | (blocks[:, 1:] != blocks[:, :-1]))
    first = first.expand_as(block_first)
    if sight.kind == "block":
        return torch.stack([first, block_last], -1)
    noisy = torch.stack([first + whole, block_first + whole, block_first, block_last], -1)
    nothing = torch.full_like(first, whole)
    clean = torch.stack([first + whole, block_last + whole, nothing, nothing], -1)
    return torch.cat([noisy, clean], 1)


def run_bounds(changes: Bool[Tensor, "rows before_last"]) -> tuple[Int[Tensor, "rows time"], Int[Tensor, "rows time"]]:
    """Return the first index of each element's run and the index after its last, where `changes` begins a new run."""
    rows, time = changes.shape[0], changes.shape[1] + 1
    index = torch.arange(time, device=changes.device).expand(rows, -1)
    edge = torch.ones(rows, 1, dtype=torch.bool, device=changes.device)
    first = index.masked_fill(~torch.cat([edge, changes], 1), 0).cummax(1).values
    ends = (index + 1).masked_fill(~torch.cat([changes, edge], 1), time)
    last = ends.flip(1).cummin(1).values.flip(1)
    return first, last


def within(
    spans: Int[Tensor, "rows queries bounds"], pieces: tuple[tuple[int, int], ...]
) -> Bool[Tensor, "rows queries keys"]:
    """Return whether each query sees each key of some pieces of the keys, piece i by span i alone."""
    seen = []
    for index, (start, stop) in enumerate(pieces[: spans.shape[-1] // 2]):
        keys = torch.arange(start, stop, device=spans.device)
        first, last = spans[..., 2 * index, None], spans[..., 2 * index + 1, None]
        seen.append((keys >= first) & (keys < last))
    return torch.cat(seen, -1)
