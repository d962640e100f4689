"""Removes copies of documents from freshly written shards."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data.tokens import HEADER_BYTES, ShardWriter, map_shard
from data.worker import SPLITS, Job, index_name, shard_name


def remove_duplicates(job: Job, results: list[dict[str, Any]], counts: Counter[str]) -> None:
    """Rewrite the shards that hold a document whose first copy is elsewhere; the first copy in order is kept.

    The source's own validation set keeps its copies.
    """
    indices = [np.load(job.folder / index_name(i)) for i in range(job.num_train_pieces)]
    if not indices:
        return
    _, first = np.unique(np.concatenate([index["digest"] for index in indices]), return_index=True)
    is_kept = np.zeros(sum(map(len, indices)), bool)
    is_kept[first] = True
    start = 0
    for i, index in enumerate(indices):
        kept = is_kept[start : start + len(index)]
        start += len(index)
        if kept.all():
            continue
        counts["duplicates"] += int((~kept).sum())
        for split, is_val in zip(SPLITS, (False, True), strict=True):
            members = index["val"] == is_val
            if not kept[members].all():
                results[i][split] = _rewrite(
                    job.folder / shard_name(split, i), job.dtype, np.repeat(kept[members], index["tokens"][members])
                )
    removed = ~is_kept
    counts["documents"] -= int(removed.sum())
    counts["bytes"] -= int(np.concatenate([index["bytes"] for index in indices])[removed].sum())


def _rewrite(path: Path, dtype: np.dtype, kept: np.ndarray) -> int:
    ids = map_shard(path, dtype) if path.stat().st_size > HEADER_BYTES else np.empty(0, dtype)
    remaining = ids[kept]
    temporary = path.with_suffix(".rewritten")
    writer = ShardWriter(temporary, dtype)
    try:
        writer.write(remaining)
        writer.close()
    finally:
        writer.abandon()
    os.replace(temporary, path)
    return writer.count
