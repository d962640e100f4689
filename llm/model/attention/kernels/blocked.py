"""Attention in blocks of queries: the kernel of CPUs and of devices without a faster one.

Each block of queries is multiplied only by the keys that it needs, and one block of scores is in memory at a time. The
backward pass recomputes scores instead of storing them.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.model.attention.kernels.query_blocks import QueryBlock
from llm.model.attention.kernels.tiles import Tile, take, tiles
from llm.ops.traceable import traceable_op

aten = torch.ops.aten
ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? document_ids, float scale, int? window, Tensor? spans"


@traceable_op(
    "crucible::blocked_attention",
    schema=f"({ARGUMENTS}, bool return_lse) -> (Tensor out, Tensor lse)",
)
def blocked_attention(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch time_k kv_heads head_dim"],
    v: Float[Tensor, "batch time_k kv_heads value_dim"],
    document_ids: Int[Tensor, "batch time_k"] | None,
    scale: float,
    window: int | None,
    spans: Int[Tensor, "rows time bounds"] | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return mixed values and, with return_lse, the log-sum-exp of each query's scores (else an empty tensor).

    Attention is causal inside documents, or each query sees the keys of its spans.
    """
    out, lse = _empty_results(q, k, v, document_ids, scale, window, spans, return_lse)
    with torch.autocast(q.device.type, enabled=False):
        for tile in tiles(q, k, document_ids, window, spans):
            queries, keys, values = tile.queries(q), tile.keys(k), tile.keys(v)
            buffer = q.new_empty(tile.num_scores)
            for block in tile.blocks:
                scores = _scores(take(queries, block), keys, tile, block, buffer, scale)
                if return_lse:
                    tile.write_queries(lse[..., None], block, scores.to(lse.dtype).logsumexp(-1, keepdim=True))
                weights = aten._softmax.out(scores, -1, False, out=scores)
                tile.write_queries(out, block, torch.bmm(weights, keys_of(values, block)))
    return out, lse


@blocked_attention.register_fake
def _empty_results(q, k, v, document_ids, scale, window, spans, return_lse) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    return out, q.new_empty(q.shape[:3] if return_lse else (0,), dtype=_precise(q))


@traceable_op(
    "crucible::blocked_attention_grad",
    schema=f"(Tensor grad_out, Tensor? grad_lse, {ARGUMENTS}) -> (Tensor dq, Tensor dk, Tensor dv)",
)
def blocked_attention_grad(
    grad_out: Float[Tensor, "batch time heads value_dim"],
    grad_lse: Float[Tensor, "batch time heads"] | None,
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch time_k kv_heads head_dim"],
    v: Float[Tensor, "batch time_k kv_heads value_dim"],
    document_ids: Int[Tensor, "batch time_k"] | None,
    scale: float,
    window: int | None,
    spans: Int[Tensor, "rows time bounds"] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, with p the weights, dp = dO Vᵀ and δ_i = Σ_j p_ij dp_ij.

        ds = p (dp − δ + dlse),   dq = scale · ds K,   dk = scale · dsᵀ Q,   dv = pᵀ dO

    Source: Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2.
    Differs: a block has all keys of its row, so p and δ need no stored statistics; ∂lse/∂s = p adds dlse.
    """
    dq, dk, dv = _empty_grads(grad_out, grad_lse, q, k, v, document_ids, scale, window, spans)
    with torch.autocast(q.device.type, enabled=False):
        for tile in tiles(q, k, document_ids, window, spans):
            _tile_grad(tile, (dq, dk, dv), grad_out, grad_lse, q, k, v, scale)
    return dq, dk, dv


@blocked_attention_grad.register_fake
def _empty_grads(grad_out, grad_lse, q, k, v, document_ids, scale, window, spans) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _tile_grad(
    tile: Tile,
    results: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
) -> None:
    """Write one tile's part of dq, dk and dv; sums over blocks are at least fp32."""
    dq, dk, dv = results
    queries, grads, keys, values = tile.queries(q), tile.queries(grad_out), tile.keys(k), tile.keys(v)
    slopes = None if grad_lse is None else tile.queries(grad_lse[..., None])
    key_sum, value_sum = (x.new_zeros(x.shape, dtype=_precise(x)) for x in (keys, values))
    buffer, grad_buffer = q.new_empty(tile.num_scores), q.new_empty(tile.num_scores)
    for block in tile.blocks:
        query, grad, own_keys = take(queries, block), take(grads, block), keys_of(keys, block)
        scores = _scores(query, keys, tile, block, buffer, scale)
        weights = aten._softmax.out(scores, -1, False, out=scores)
        slope = grad_buffer[: weights.numel()].view(weights.shape)
        torch.bmm(grad, keys_of(values, block).transpose(1, 2), out=slope)
        _add_product(value_sum, block, weights.transpose(1, 2), grad, 1.0)
        aten._softmax_backward_data.out(slope, weights, -1, weights.dtype, grad_input=slope)
        if slopes is not None:
            slope.addcmul_(weights, take(slopes, block).to(weights.dtype))
        tile.write_queries(dq, block, torch.bmm(slope, own_keys).mul_(scale))
        _add_product(key_sum, block, slope.transpose(1, 2), query, scale)
    tile.write_keys(dk, key_sum)
    tile.write_keys(dv, value_sum)


def _scores(
    query: Tensor, keys: Tensor, tile: Tile, block: QueryBlock, buffer: Tensor, scale: float
) -> Float[Tensor, "tile_heads rows keys"]:
    """Return scale · q·k of one block in the buffer, with -inf where a query does not see a key.

    The product is added to a bias of 0 and -inf: torch fills a broadcast mask at a tenth of the speed of a copy.
    """
    shape = (*query.shape[:2], block.num_keys)
    scores, own_keys = buffer[: shape[0] * shape[1] * shape[2]].view(shape), keys_of(keys, block).transpose(1, 2)
    visible = tile.visible(block)
    if visible is None:
        return torch.baddbmm(scores, query, own_keys, beta=0, alpha=scale, out=scores)
    bias = scores.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
    scores.view(len(bias), -1, block.stop - block.start, shape[2]).copy_(bias[:, None])
    return scores.baddbmm_(query, own_keys, alpha=scale)


def keys_of(x: Float[Tensor, "tile_heads time_k dim"], block: QueryBlock) -> Float[Tensor, "tile_heads keys dim"]:
    """Return the keys of a block, or their values; those of both ranges where there are two."""
    first, own = (x[:, start:stop] for start, stop in block.pieces)
    return first if not own.shape[1] else torch.cat([first, own], 1)


def _add_product(total: Tensor, block: QueryBlock, a: Tensor, b: Tensor, scale: float) -> None:
    """Add scale · a b to the keys of a block in a sum that may have a more precise dtype."""
    begin = 0
    for start, stop in block.pieces:
        part, rows = total[:, start:stop], a[:, begin : begin + stop - start]
        begin += stop - start
        if start == stop:
            continue
        if a.dtype == total.dtype:
            part.baddbmm_(rows, b, alpha=scale)
        else:
            part.add_(torch.bmm(rows, b), alpha=scale)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, document_ids, ctx.scale, ctx.window, spans, ctx.has_lse = inputs
    ctx.save_for_backward(q, k, v, document_ids, spans)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, document_ids, spans = ctx.saved_tensors
    slopes = grad_lse if ctx.has_lse else None
    grads = blocked_attention_grad(grad_out, slopes, q, k, v, document_ids, ctx.scale, ctx.window, spans)
    return *grads, None, None, None, None, None


blocked_attention.register_autograd(_backward, setup_context=_save)
