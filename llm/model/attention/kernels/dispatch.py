"""The function that attentions call: it checks shapes and chooses the kernel."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import CAUSAL, Sight
from llm.errors import ShapeError
from llm.model.attention.kernels.blocked import blocked_attention
from llm.model.attention.kernels.cuda import cuda_attention, sdpa, sighted_cuda_attention
from llm.model.attention.kernels.key_spans import key_spans
from llm.model.attention.kernels.reference import visible_keys
from llm.model.attention.kernels.torch_attention import can_use_sdpa, sdpa_by_rows
from llm.ops.batch_memo import BatchMemo
from llm.ops.kernel_choice import current

_spans: BatchMemo[Tensor] = BatchMemo()

FEW_QUERIES = 16
"""Up to this many queries against stored keys (decoding), one masked product reads the keys without a copy."""


def causal_attention(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch time_k kv_heads head_dim"],
    v: Float[Tensor, "batch time_k kv_heads value_dim"],
    *,
    document_ids: Int[Tensor, "batch time_k"] | None = None,
    scale: float,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mix values by the softmax of scores, each query seeing the keys of its document up to itself.

        o_i = Σ_j softmax_j(scale · q_i·k_j) v_j,   lse_i = log Σ_j exp(scale · q_i·k_j)

    CUDA uses SDPA where every row is one document, and variable-length flash attention or FlexAttention for documents
    and windows. Other devices use blocks of queries (`llm.model.attention.kernels.blocked`). A CPU on which SDPA was
    measured to be faster uses it for rows of one document. None of these stores a time x time matrix, except SDPA's
    math kernel, which torch uses on a GPU for fp32 with grouped heads. Both results have
    gradients. Under autocast the inputs are cast to its dtype.

    Args:
        q: queries; query i belongs to key time_k - time + i, so a chunk can follow stored keys.
        k: keys; kv_heads divides heads, consecutive query heads share a key/value head.
        v: values.
        document_ids: id of each key's document, ascending along a row; None where every row is one document.
        scale: factor on the scores, usually head_dim^-1/2.
        window: number of keys that a query sees, itself included, at least 1; None for all.
        return_lse: also return lse in fp32, [batch time heads].

    Raises:
        ShapeError: shapes do not match, or window is below 1.
    """
    _check(q, k, v, window)
    q, k, v = _cast(q, k, v)
    options = {"document_ids": document_ids, "scale": scale, "window": window}
    if q.shape[1] <= FEW_QUERIES and not return_lse and q.shape[1] < k.shape[1]:
        return _decode(q, k, v, **options)
    if q.is_cuda:
        out, lse = cuda_attention(q, k, v, **options, return_lse=return_lse)
    elif current().attention == "sdpa" and can_use_sdpa(q, k, v, window=window, return_lse=return_lse):
        return sdpa_by_rows(q, k, v, document_ids=document_ids, scale=scale)
    else:
        out, lse = blocked_attention(q, k, v, document_ids, scale, window, None, return_lse)
    return (out, lse) if return_lse else out


def sighted_attention(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch time_k kv_heads head_dim"],
    v: Float[Tensor, "batch time_k kv_heads value_dim"],
    *,
    sight: Sight,
    positions: Int[Tensor, "batch positions"],
    document_ids: Int[Tensor, "batch time_k"] | None = None,
    scale: float,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mix values by the softmax of scores, each query seeing the keys of a sight; see `causal_attention`.

    A CPU computes each block of queries with the span of keys that they see. CUDA uses SDPA or variable-length flash
    attention under `bidirectional`, and FlexAttention under sights with blocks. No time x time matrix is stored.

    Args:
        sight: which keys of its document a query sees.
        positions: position of each key within its document; read under sights with blocks alone.
        q, k, v, document_ids, scale, window, return_lse: see `causal_attention`; window acts in both directions.

    Raises:
        ShapeError: shapes do not match, or a sight with blocks has fewer queries than keys.
    """
    if sight == CAUSAL:
        options = {"document_ids": document_ids, "scale": scale, "window": window, "return_lse": return_lse}
        return causal_attention(q, k, v, **options)
    _check(q, k, v, window)
    q, k, v = _cast(q, k, v)
    sizes = {"time": q.shape[1], "time_k": k.shape[1], "window": window}
    spans = _spans(
        *((positions, document_ids), (sight, *sizes.values())),
        lambda: key_spans(sight, positions=positions, document_ids=document_ids, **sizes),
    )
    if q.is_cuda:
        options = {"sight": sight, "spans": spans, "document_ids": document_ids, "scale": scale, "window": window}
        out, lse = sighted_cuda_attention(q, k, v, **options, return_lse=return_lse)
    else:
        out, lse = blocked_attention(q, k, v, None, scale, None, spans, return_lse)
    return (out, lse) if return_lse else out


def _decode(
    q: Tensor, k: Tensor, v: Tensor, *, document_ids: Tensor | None, scale: float, window: int | None
) -> Tensor:
    """Attend from a few queries to many keys by torch's own attention, with a time x time_k mask where needed."""
    if q.shape[1] == 1 and document_ids is None:
        reach = k.shape[1] if window is None else min(window, k.shape[1])
        return sdpa(q, k[:, -reach:], v[:, -reach:], scale=scale, is_causal=False, mask=None)
    visible = visible_keys(
        time=q.shape[1], time_k=k.shape[1], device=q.device, document_ids=document_ids, window=window
    )
    return sdpa(q, k, v, scale=scale, is_causal=False, mask=visible[:, None])


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the dtype of autocast, as a product would, or else to the dtype of the first tensor."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[0].dtype
    return tuple(x.to(dtype) for x in tensors)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    if q.shape[2] % k.shape[2] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ShapeError(
            f"attention q={tuple(q.shape)}, k={tuple(k.shape)}, v={tuple(v.shape)}: must be "
            "[batch time heads dim], with kv_heads dividing heads; check what the position and the projections return"
        )
    if q.shape[1] > k.shape[1]:
        raise ShapeError(f"attention time={q.shape[1]}: exceeds time_k={k.shape[1]}; pass the keys of the queries too")
    if window is not None and window < 1:
        raise ShapeError(f"attention window={window}: must be at least 1 (a query sees itself); use None for all keys")
