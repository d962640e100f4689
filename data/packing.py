"""Turns windows of token ids into a Batch, by pure functions of the windows.

A window has context_length + 1 consecutive ids of the token stream; the last one is only a label. Where a document
begins inside the window, `document_ids` increases by one and `positions` restarts at 0.
"""

import numpy as np
import torch
from jaxtyping import Int

from llm.contracts import IGNORED_LABEL, Batch


def pack(windows: Int[np.ndarray, "batch window"], *, bos_id: int, unscored_bit: int = 0) -> Batch:
    """Turn windows of context_length + 1 ids into a batch of context_length columns.

    Args:
        windows: ids, int64; `unscored_bit` may be set in them.
        bos_id: the id that begins each document.
        unscored_bit: bit of an id that carries no loss as a label, or 0 where all do.
    """
    ids, labels = windows[:, :-1], windows[:, 1:]
    if unscored_bit:
        labels = np.where(labels & unscored_bit, IGNORED_LABEL, labels)
        ids = ids & ~unscored_bit
    document_ids, positions = documents_and_positions(ids == bos_id)
    return Batch(
        input_ids=torch.from_numpy(np.ascontiguousarray(ids)),
        labels=torch.from_numpy(np.ascontiguousarray(labels)),
        positions=torch.from_numpy(positions),
        document_ids=torch.from_numpy(document_ids),
    )


def documents_and_positions(
    is_first: np.ndarray,
) -> tuple[Int[np.ndarray, "batch time"], Int[np.ndarray, "batch time"]]:
    """Return, for each token, the number of documents that have begun in the window, and its position in its document.

    Args:
        is_first: bool, batch x time: whether a token begins a document.
    """
    columns = np.arange(is_first.shape[1], dtype=np.int64)
    starts = np.maximum.accumulate(np.where(is_first, columns, 0), axis=1)
    return np.cumsum(is_first, axis=1, dtype=np.int64), columns - starts
