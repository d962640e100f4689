"""Softmax attention over several position views, where the distance of a pair decides which view scores it."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm.contracts import PositionView
from llm.model.attention.kernels import causal_attention
from llm.model.attention.kernels.reference import visible_keys

FEW_QUERIES = 16
"""Up to this many queries (decoding), all scores are in memory at once: two products cost less than two passes."""


def attend_views(
    views: tuple[PositionView, ...],
    v: Float[Tensor, "batch time_k kv_heads value_dim"],
    *,
    document_ids: Int[Tensor, "batch time_k"] | None,
    scale: float,
    window: int | None = None,
    return_lse: bool = False,
) -> Any:
    """Mix values by one softmax over all keys, computing each pair once, with the kernels of `causal_attention`.

    The near view attends within a band. The far view, for distances from w on, is causal attention of sequences that
    are shifted by w: query i against the keys up to i − w. Both passes return the log-sum-exp of their scores:

        o = g · near + (1 − g) · far,   g = σ(lse_near − lse_far)

    Args:
        views: one or two; query i belongs to key time_k − time + i.
        v: values of all keys.
        document_ids: document of each key, ascending along a row, or None where every row is one document.
        scale: factor on the scores.
        window: number of keys that a query sees, itself included, or None for all.
        return_lse: also return the log-sum-exp of all scores of each query, [batch time heads].

    Returns:
        The mixed values, [batch time heads value_dim], and the log-sum-exp where it is asked for.

    Source: merging by log-sum-exp as in FlashAttention, arXiv:2205.14135, algorithm 1; views of kexue.fm/archives/9708.
    """
    near = views[0]
    time, time_k = near.q.shape[1], v.shape[1]
    split = views[-1].min_distance
    if len(views) == 1 or split >= time_k or (window is not None and window <= split):
        options = {"document_ids": document_ids, "scale": scale, "window": window}
        return causal_attention(near.q, near.k, v, **options, return_lse=return_lse)
    if time <= FEW_QUERIES and not return_lse:
        return reference_views(views, v, document_ids=document_ids, scale=scale, window=window)
    options = {"scale": scale, "return_lse": True}
    out, lse = causal_attention(near.q, near.k, v, document_ids=document_ids, window=split, **options)
    count = min(time, time_k - split)  # queries that are far enough from the first key
    ids = None if document_ids is None else document_ids[:, : time_k - split]
    far_out, far_lse = causal_attention(
        views[-1].q[:, time - count :],
        views[-1].k[:, : time_k - split],
        v[:, : time_k - split],
        document_ids=ids,
        window=None if window is None else window - split,
        **options,
    )
    near_lse = lse[:, time - count :]
    share = torch.sigmoid(near_lse - far_lse)
    if document_ids is not None and ids is not None:
        # where the key at distance w is of another document, so are all keys beyond it: the far result is discarded
        serves = document_ids[:, time_k - count :] == ids[:, time_k - split - count :]
        share = torch.where(serves[..., None], share, 1.0)
    if return_lse:
        total = torch.where(share == 1, near_lse, torch.logaddexp(near_lse, far_lse))
        lse = torch.cat((lse[:, : time - count], total), dim=1)
    share = share[..., None]
    merged = share * out[:, time - count :] + (1 - share) * far_out  # exactly the near result where share is 1
    mixed = torch.cat((out[:, : time - count], merged.to(out.dtype)), dim=1)
    return (mixed, lse) if return_lse else mixed


def reference_views(
    views: tuple[PositionView, ...],
    v: Float[Tensor, "batch time_k kv_heads value_dim"],
    *,
    document_ids: Int[Tensor, "batch time_k"] | None,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "batch time heads value_dim"]:
    """Mix values by one softmax over `pair_scores`: the slow definition."""
    time, time_k = views[0].q.shape[1], v.shape[1]
    visible = visible_keys(time=time, time_k=time_k, device=v.device, document_ids=document_ids, window=window)
    weights = softmax_weights(pair_scores(views) * scale, visible)
    return torch.einsum("bgnqk,bkgd->bqgnd", weights.to(v.dtype), v).flatten(2, 3)


def pair_scores(views: tuple[PositionView, ...]) -> Float[Tensor, "batch kv_heads group time time_k"]:
    """Score every pair by every view and take the last view that applies, in fp32 (fp64 for fp64)."""
    scores = None
    for view in views:
        time, (time_k, kv_heads) = view.q.shape[1], view.k.shape[1:3]
        scored = torch.einsum("bqgnd,bkgd->bgnqk", view.q.unflatten(2, (kv_heads, -1)), view.k)
        scored = scored.to(torch.promote_types(scored.dtype, torch.float32))
        places = torch.arange(time_k, device=scored.device)
        distance = places[time_k - time :, None] - places
        scores = scored if scores is None else torch.where(distance >= view.min_distance, scored, scores)
    assert scores is not None, "a position gives at least one view"
    return scores


def softmax_weights(
    scores: Float[Tensor, "batch kv_heads group time time_k"], visible: Bool[Tensor, "rows time time_k"]
) -> Float[Tensor, "batch kv_heads group time time_k"]:
    """Return the softmax of scores over the visible keys."""
    return scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
