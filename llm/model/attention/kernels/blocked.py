"""Causal attention in blocks of queries: the kernel of CPUs and of devices without a faster one.

Each block of queries is multiplied only by the keys that it needs, and one block of scores is in memory at a time. The
backward pass recomputes scores instead of storing them.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.model.attention.kernels.query_blocks import QueryBlock
from llm.model.attention.kernels.reference import visible_keys
from llm.model.attention.kernels.tiles import Tile, take, tiles

aten = torch.ops.aten
ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? document_ids, float scale, int? window"


@torch.library.custom_op(
    "crucible::blocked_attention",
    mutates_args=(),
    schema=f"({ARGUMENTS}, bool return_lse) -> (Tensor out, Tensor lse)",
)
def blocked_attention(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch time_k kv_heads head_dim"],
    v: Float[Tensor, "batch time_k kv_heads value_dim"],
    document_ids: Int[Tensor, "batch time_k"] | None,
    scale: float,
    window: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return mixed values and, with return_lse, the log-sum-exp of each query's scores (else an empty tensor)."""
    out, lse = _empty_results(q, k, v, document_ids, scale, window, return_lse)
    with torch.autocast(q.device.type, enabled=False):
        for tile in tiles(q, k, document_ids, window):
            queries, keys, values = tile.queries(q), tile.keys(k), tile.keys(v)
            buffer = q.new_empty(tile.num_scores)
            for block in tile.blocks:
                scores = _scores(take(queries, block), keys, tile, block, buffer, scale)
                if return_lse:
                    tile.write_queries(lse[..., None], block, scores.to(lse.dtype).logsumexp(-1, keepdim=True))
                weights = aten._softmax.out(scores, -1, False, out=scores)
                tile.write_queries(out, block, torch.bmm(weights, values[:, block.key_start : block.key_stop]))
    return out, lse


@blocked_attention.register_fake
def _empty_results(q, k, v, document_ids, scale, window, return_lse) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    return out, q.new_empty(q.shape[:3] if return_lse else (0,), dtype=_precise(q))


@torch.library.custom_op(
    "crucible::blocked_attention_grad",
    mutates_args=(),
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, with p the weights, dp = dO Vᵀ and δ_i = Σ_j p_ij dp_ij.

        ds = p (dp − δ + dlse),   dq = scale · ds K,   dk = scale · dsᵀ Q,   dv = pᵀ dO

    Source: Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2.
    Differs: a block has all keys of its row, so p and δ need no stored statistics; ∂lse/∂s = p adds dlse.
    """
    dq, dk, dv = _empty_grads(grad_out, grad_lse, q, k, v, document_ids, scale, window)
    with torch.autocast(q.device.type, enabled=False):
        for tile in tiles(q, k, document_ids, window):
            _tile_grad(tile, (dq, dk, dv), grad_out, grad_lse, q, k, v, scale)
    return dq, dk, dv


@blocked_attention_grad.register_fake
def _empty_grads(grad_out, grad_lse, q, k, v, document_ids, scale, window) -> tuple[Tensor, Tensor, Tensor]:
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
        span, query, grad = slice(block.key_start, block.key_stop), take(queries, block), take(grads, block)
        scores = _scores(query, keys, tile, block, buffer, scale)
        weights = aten._softmax.out(scores, -1, False, out=scores)
        slope = grad_buffer[: weights.numel()].view(weights.shape)
        torch.bmm(grad, values[:, span].transpose(1, 2), out=slope)
        _add_product(value_sum[:, span], weights.transpose(1, 2), grad, 1.0)
        aten._softmax_backward_data.out(slope, weights, -1, weights.dtype, grad_input=slope)
        if slopes is not None:
            slope.addcmul_(weights, take(slopes, block).to(weights.dtype))
        tile.write_queries(dq, block, torch.bmm(slope, keys[:, span]).mul_(scale))
        _add_product(key_sum[:, span], slope.transpose(1, 2), query, scale)
    tile.write_keys(dk, key_sum)
    tile.write_keys(dv, value_sum)


def _scores(
    query: Tensor, keys: Tensor, tile: Tile, block: QueryBlock, buffer: Tensor, scale: float
) -> Float[Tensor, "tile_heads rows keys"]:
    """Return scale · q·k of one block in the buffer, with -inf where a query does not see a key.

    The product is added to a bias of 0 and -inf: torch fills a broadcast mask at a tenth of the speed of a copy.
    """
    span, num_queries = slice(block.key_start, block.key_stop), block.stop - block.start
    shape = (*query.shape[:2], block.key_stop - block.key_start)
    scores = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
    ids = tile.document_ids if block.is_masked else None
    visible = visible_keys(
        time=num_queries,
        time_k=shape[2],
        device=scores.device,
        document_ids=None if ids is None else ids[:, span],
        window=tile.window if block.is_masked else None,
    )
    bias = scores.new_zeros(visible.shape).masked_fill_(~visible, float("-inf"))
    scores.view(len(bias), -1, num_queries, shape[2]).copy_(bias[:, None])
    return scores.baddbmm_(query, keys[:, span].transpose(1, 2), alpha=scale)


def _add_product(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Add scale · a b to a sum that may have a more precise dtype."""
    if a.dtype == total.dtype:
        total.baddbmm_(a, b, alpha=scale)
    else:
        total.add_(torch.bmm(a, b), alpha=scale)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, document_ids, ctx.scale, ctx.window, ctx.has_lse = inputs
    ctx.save_for_backward(q, k, v, document_ids)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, document_ids = ctx.saved_tensors
    slopes = grad_lse if ctx.has_lse else None
    grads = blocked_attention_grad(grad_out, slopes, q, k, v, document_ids, ctx.scale, ctx.window)
    return *grads, None, None, None, None


blocked_attention.register_autograd(_backward, setup_context=_save)
