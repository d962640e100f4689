"""Attention on a CUDA device: SDPA's flash kernel, variable-length flash for documents, else FlexAttention."""

import contextlib
import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import Sight
from llm.ops.batch_memo import BatchMemo

HALF = (torch.float16, torch.bfloat16)

_offsets: BatchMemo[Tensor] = BatchMemo()
_masks: BatchMemo[Any] = BatchMemo()


def cuda_attention(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch time_k kv_heads head_dim"],
    v: Float[Tensor, "batch time_k kv_heads value_dim"],
    *,
    document_ids: Int[Tensor, "batch time_k"] | None,
    scale: float,
    window: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Choose a kernel by mask and dtype, and run it.

    A causal mask alone runs on SDPA. Documents and windows in half precision run on variable-length flash attention.
    Everything else runs on FlexAttention. Without `return_lse` the second result is empty.
    """
    whole = q.shape[1] == k.shape[1]
    if not return_lse and whole and document_ids is None and window is None:
        return sdpa(q, k, v, scale=scale, is_causal=True, mask=None), q.new_empty(0)
    if not return_lse and whole and can_use_varlen(q, v, document_ids):
        return varlen(q, k, v, document_ids=document_ids, scale=scale, window=window), q.new_empty(0)
    return flex(q, k, v, document_ids=document_ids, scale=scale, window=window, return_lse=return_lse)


def sighted_cuda_attention(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch time_k kv_heads head_dim"],
    v: Float[Tensor, "batch time_k kv_heads value_dim"],
    *,
    sight: Sight,
    spans: Int[Tensor, "rows time bounds"],
    document_ids: Int[Tensor, "batch time_k"] | None,
    scale: float,
    window: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Choose a kernel for a sight other than causal, and run it.

    Bidirectional attention over whole rows runs on SDPA, and inside documents and windows in half precision on
    variable-length flash attention. Everything else runs on FlexAttention. Without `return_lse` the second result is
    empty.
    """
    whole, nothing = q.shape[1] == k.shape[1], q.new_empty(0)
    if return_lse:
        return flex_spans(q, k, v, spans=spans, scale=scale, return_lse=True)
    if sight.kind == "bidirectional" and document_ids is None and window is None:
        return sdpa(q, k, v, scale=scale, is_causal=False, mask=None), nothing
    if sight.kind == "bidirectional" and whole and can_use_varlen(q, v, document_ids):
        return varlen(q, k, v, document_ids=document_ids, scale=scale, window=window, is_causal=False), nothing
    return flex_spans(q, k, v, spans=spans, scale=scale, return_lse=False)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, is_causal: bool, mask: Tensor | None) -> Tensor:
    """Call torch's own attention with axes [batch time heads dim]."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


@functools.cache
def varlen_kernel() -> Any:
    """Return torch's variable-length attention, None where it lacks the options that are used here.

    It is imported on a GPU only, because the import loads torch's compiler.
    """
    with contextlib.suppress(ImportError):  # a torch without it uses FlexAttention
        from torch.nn.attention.varlen import varlen_attn

        if {"window_size", "scale", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
            return varlen_attn
    return None


def can_use_varlen(q: Tensor, v: Tensor, document_ids: Tensor | None) -> bool:
    """Return whether variable-length flash attention supports these tensors.

    The number of documents decides a shape, which traced code cannot depend on; FlexAttention takes it there.
    """
    if document_ids is not None and torch.compiler.is_compiling():
        return False
    is_flash_shape = q.dtype in HALF and q.shape[-1] == v.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    return is_flash_shape and varlen_kernel() is not None and torch.cuda.get_device_capability(q.device) >= (8, 0)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    document_ids: Tensor | None,
    scale: float,
    window: int | None,
    is_causal: bool = True,
) -> Tensor:
    """Attend within each document of each row, as sequences that are concatenated."""
    batch, time = q.shape[:2]
    offsets = _offsets((document_ids,), (batch, time, q.device), lambda: sequence_offsets(q, document_ids))
    left = -1 if window is None else window - 1
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    options: dict[str, Any] = {
        "scale": scale,
        "window_size": (left, 0 if is_causal else left),
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    out = varlen_kernel()(q, k, v, offsets, offsets, time, time, **options)
    return out.unflatten(0, (batch, time))


def sequence_offsets(
    q: Float[Tensor, "batch time heads head_dim"], document_ids: Int[Tensor, "batch time"] | None
) -> Int[Tensor, " bucket"]:
    """Return where each document begins in the concatenation of all rows, and the end, repeated to fill a bucket.

    Flash attention allocates memory for 128 tokens per sequence, so unused sequences are not free. The length is 1 plus
    a power of two, so that few lengths occur. Counting documents waits for the device, once per batch.
    """
    batch, time = q.shape[:2]
    rows = torch.arange(0, batch * time + 1, time, device=q.device, dtype=torch.int32)
    if document_ids is None:
        return rows
    starts_document = torch.ones(batch, time, dtype=torch.bool, device=q.device)
    starts_document[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = starts_document.flatten().nonzero()[:, 0].to(torch.int32)
    bucket = 1 << (len(starts) - 1).bit_length()
    return F.pad(starts, (0, bucket + 1 - len(starts)), value=batch * time)


@functools.cache
def compiled_flex() -> tuple[Any, Any]:
    """Return FlexAttention and its mask builder, compiled once; torch makes varying shapes dynamic."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)


def flex_spans(
    q: Tensor, k: Tensor, v: Tensor, *, spans: Tensor, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Run FlexAttention where each query sees one or two spans of keys; see `key_spans`."""
    attend, build_mask = compiled_flex()
    rows = None if len(spans) == 1 else len(spans)
    sizes = (rows, None, q.shape[1], k.shape[1])
    mask = _masks(
        *((spans,), (sizes, q.device)),
        lambda: build_mask(lambda row, _, query, key: is_within(spans[row, query], key), *sizes, device=q.device),
    )
    heads = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    result = attend(*heads, block_mask=mask, scale=scale, enable_gqa=grouped, return_lse=return_lse)
    if not return_lse:
        return result.transpose(1, 2), q.new_empty(0)
    out, lse = result
    return out.transpose(1, 2), lse.transpose(1, 2)


def is_within(bounds: Tensor, key: Tensor) -> Tensor:
    """Return whether a key lies in one of the spans of a query."""
    seen = (key >= bounds[0]) & (key < bounds[1])
    return seen if len(bounds) == 2 else seen | ((key >= bounds[2]) & (key < bounds[3]))


def flex(
    q: Tensor, k: Tensor, v: Tensor, *, document_ids: Tensor | None, scale: float, window: int | None, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Run FlexAttention with a block mask; blocks that no query sees are not computed, and lse has a gradient."""
    batch, time, heads, _ = q.shape
    time_k, offset = k.shape[1], k.shape[1] - time
    ids = torch.zeros(1, time_k, dtype=torch.int32, device=q.device) if document_ids is None else document_ids
    reach = time_k if window is None else window

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = query + offset
        return (key <= at) & (at - key < reach) & (ids[row, at] == ids[row, key])

    attend, build_mask = compiled_flex()
    sizes = (batch if document_ids is not None else None, None, time, time_k)
    mask = _masks((document_ids,), (sizes, window, q.device), lambda: build_mask(visible, *sizes, device=q.device))
    result = attend(
        *(x.transpose(1, 2) for x in (q, k, v)),
        block_mask=mask,
        scale=scale,
        enable_gqa=heads != k.shape[2],
        return_lse=return_lse,
    )
    if not return_lse:
        return result.transpose(1, 2), q.new_empty(0)
    out, lse = result
    return out.transpose(1, 2), lse.transpose(1, 2)
