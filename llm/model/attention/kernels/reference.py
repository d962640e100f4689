"""The definition of attention under every sight, with which tests compare every kernel."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm.contracts import CAUSAL, Sight


def visible_keys(
    *,
    time: int,
    time_k: int,
    device: torch.device,
    document_ids: Int[Tensor, "batch time_k"] | None,
    window: int | None,
    sight: Sight = CAUSAL,
    positions: Int[Tensor, "batch time_k"] | None = None,
) -> Bool[Tensor, "rows {time} {time_k}"]:
    """Return which keys each query sees: those of its sight, inside the window and of its own document.

    Query i belongs to key `time_k - time + i`. `rows` is the batch, or 1 where every row sees the same keys. Sights
    with blocks need the `positions` of the keys.
    """
    query_at = torch.arange(time_k - time, time_k, device=device)[:, None]
    key_at = torch.arange(time_k, device=device)[None, :]
    if sight.kind == "causal":
        visible = (key_at <= query_at)[None]
    elif sight.kind == "bidirectional":
        visible = torch.ones(1, time, time_k, dtype=torch.bool, device=device)
    else:
        assert positions is not None, "a sight with blocks needs positions"
        key_block = (positions // sight.block_length)[:, None, :]
        query_block = key_block[:, 0, time_k - time :, None]
        visible = key_block <= query_block
        if sight.kind == "block_pair":
            noisy_query, noisy_key = query_at < time_k // 2, key_at < time_k // 2
            to_clean = torch.where(noisy_query, key_block < query_block, key_block <= query_block)
            visible = torch.where(noisy_key, noisy_query & (key_block == query_block), to_clean)
    if window is not None:
        visible = visible & ((query_at - key_at).abs() < window)
    if document_ids is not None:
        visible = visible & (document_ids[:, time_k - time :, None] == document_ids[:, None, :])
    return visible


def reference_attention(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch time_k kv_heads head_dim"],
    v: Float[Tensor, "batch time_k kv_heads value_dim"],
    *,
    document_ids: Int[Tensor, "batch time_k"] | None = None,
    scale: float,
    window: int | None = None,
    return_lse: bool = False,
    sight: Sight = CAUSAL,
    positions: Int[Tensor, "batch time_k"] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with the whole time x time matrix in memory, in the dtype of the inputs, differentiated by autograd.

        o_i = Σ_j softmax_j(scale · q_i·k_j) v_j   over the keys that query i sees
        lse_i = log Σ_j exp(scale · q_i·k_j)

    Arguments and results are those of `causal_attention` and `sighted_attention`.
    """
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    sizes = {"time": q.shape[1], "time_k": k.shape[1], "device": q.device}
    visible = visible_keys(**sizes, document_ids=document_ids, window=window, sight=sight, positions=positions)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    return (out, scores.logsumexp(-1).transpose(1, 2)) if return_lse else out
