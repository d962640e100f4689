"""Decides which keys each block of queries needs, in plain integers, before any arithmetic."""

from bisect import bisect_right
from collections.abc import Collection, Sequence
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from llm.ops.kernel_choice import current

SHORT_DOCUMENT = 32
"""Whole documents share a masked query block until it has this many tokens, because tiny products are slow."""


class QueryBlock(NamedTuple):
    """Queries [start, stop) with their keys [key_start, key_stop); under causality the last of these are their own.

    A noisy copy that is followed by its clean copy also has keys [own_start, own_stop) in the noisy copy.
    """

    start: int
    stop: int
    key_start: int
    key_stop: int
    is_masked: bool
    """Whether a document, a window or a block hides one of these keys from one of these queries."""
    own_start: int = 0
    own_stop: int = 0

    @property
    def pieces(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The two ranges of keys."""
        return (self.key_start, self.key_stop), (self.own_start, self.own_stop)

    @property
    def num_keys(self) -> int:
        """Number of keys in both ranges."""
        return self.key_stop - self.key_start + self.own_stop - self.own_start


class RowPlan(NamedTuple):
    """The query blocks of rows that are computed together."""

    rows: list[int]
    blocks: list[QueryBlock]
    is_uniform: bool
    """Whether the documents of all rows start at the same tokens."""


def plan_rows(
    document_ids: Int[Tensor, "batch time_k"] | None,
    *,
    batch: int,
    time: int,
    time_k: int,
    window: int | None,
    block: int,
) -> list[RowPlan]:
    """Group the rows of a batch by the starts of their documents, and cut each group into query blocks.

    Rows up to `KernelChoice.short_row` keys form one group, whatever their documents: a batch of products under a mask
    per row may cost less than products per row.

    Args:
        document_ids: id of each key's document, or None where every row is one document.
        batch: number of rows.
        time: number of queries; query i belongs to key time_k - time + i.
        time_k: number of keys.
        window: number of keys that a query sees, itself included; None for all.
        block: largest number of queries in a block.
    """
    boundaries: list[list[int]] = [[] for _ in range(batch)]
    if document_ids is not None:
        for row, column in (document_ids[:, 1:] != document_ids[:, :-1]).nonzero().tolist():
            boundaries[row].append(column + 1)
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, cuts in enumerate(boundaries):
        groups.setdefault(tuple(cuts), []).append(row)
    sizes = {"time": time, "time_k": time_k, "window": window, "block": block}
    if len(groups) > 1 and time_k <= current().short_row:
        cuts = set().union(*boundaries)
        return [RowPlan(list(range(batch)), [_masked_by(cuts, b) for b in plan_row([], **sizes)], is_uniform=False)]
    return [RowPlan(rows, plan_row(cuts, **sizes), is_uniform=True) for cuts, rows in groups.items()]


def plan_spans(spans: Int[Tensor, "rows time bounds"], *, batch: int, time_k: int, block: int) -> list[RowPlan]:
    """Cut queries that see the given spans of keys into blocks, and group the rows; see `key_spans`.

    Args:
        spans: first key and the key after the last one of each query, once or twice; one row stands for all rows.
        batch: number of rows.
        time_k: number of keys.
        block: largest number of queries in a block.
    """
    if bool((spans == spans[:1]).all()):
        return [RowPlan(list(range(batch)), _span_blocks(spans[:1], block), is_uniform=True)]
    if time_k <= current().short_row:
        return [RowPlan(list(range(batch)), _span_blocks(spans, block), is_uniform=False)]
    groups: dict[bytes, list[int]] = {}
    for row, own in enumerate(spans):
        groups.setdefault(own.contiguous().numpy().tobytes(), []).append(row)
    return [RowPlan(rows, _span_blocks(spans[rows[:1]], block), is_uniform=True) for rows in groups.values()]


def _span_blocks(spans: Int[Tensor, "rows time bounds"], block: int) -> list[QueryBlock]:
    """Return consecutive blocks of queries with all keys that one of them sees in one of the rows."""
    blocks, start = [], 0
    for part in spans.split(block, 1):
        stop = start + part.shape[1]
        lows, highs = part[..., ::2].flatten(0, 1), part[..., 1::2].flatten(0, 1)
        low, high = lows.amin(0), highs.amax(0)
        is_masked = bool((lows != low).any()) or bool((highs != high).any())
        (key_start, *own_start), (key_stop, *own_stop) = low.tolist(), high.tolist()
        blocks.append(QueryBlock(start, stop, key_start, key_stop, is_masked, *own_start, *own_stop))
        start = stop
    return blocks


def _masked_by(cuts: Collection[int], block: QueryBlock) -> QueryBlock:
    """Return the block, marked as masked if a document of any row starts among its keys."""
    return block._replace(is_masked=block.is_masked or any(block.key_start < c < block.key_stop for c in cuts))


def plan_row(boundaries: Sequence[int], *, time: int, time_k: int, window: int | None, block: int) -> list[QueryBlock]:
    """Cut one row's queries into blocks of at most `block`.

    A block ends where its document ends. No key of another document is multiplied then, and no mask is needed. Only
    whole documents under SHORT_DOCUMENT tokens share a block. `boundaries` are the keys at which a new document starts,
    ascending, without 0.
    """
    offset = time_k - time
    starts = [0, *boundaries]
    ends = [*(b - offset for b in boundaries), time]
    blocks, start = [], 0
    while start < time:
        document = bisect_right(starts, offset + start) - 1
        begins = starts[document] == offset + start
        stop = _block_stop(start, ends[document:], begins=begins, limit=start + block)
        key_start, key_stop = starts[document], offset + stop
        if window is not None:
            key_start = max(key_start, offset + start - window + 1)
        crosses = ends[document] < stop
        slides = window is not None and key_start < key_stop - window
        blocks.append(QueryBlock(start, stop, key_start, key_stop, crosses or slides))
        start = stop
    return blocks


def _block_stop(start: int, ends: Sequence[int], *, begins: bool, limit: int) -> int:
    """Return where the block from `start` stops; `ends` are the ends of its document and of those after it."""
    stop = min(ends[0], limit)
    if not begins:  # the rest of a document needs a long row of keys, which no other document shares
        return stop
    for end in ends[1:]:
        if stop - start >= SHORT_DOCUMENT or end > limit:
            break
        stop = end
    return stop
