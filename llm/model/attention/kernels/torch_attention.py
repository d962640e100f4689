"""Causal attention on a CPU by torch's own kernel: rows of one document, and short rows whose documents differ."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.model.attention.kernels.blocked import blocked_attention
from llm.model.attention.kernels.cuda import sdpa
from llm.model.attention.kernels.reference import visible_keys

FLASH_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes for which torch's attention on a CPU stores no time x time matrix."""

MASKED_UP_TO = 512
"""Longest rows that are computed under a mask of their documents: the mask has time x time bits per row."""


def can_use_sdpa(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, return_lse: bool) -> bool:
    """Return whether torch's kernel can compute these rows eagerly, without a matrix of all scores for long ones.

    Traced code never uses it: compiled runs with it have returned NaN on a CPU (torch 2.13, emulated AVX2).
    """
    is_whole = q.shape[1] == k.shape[1] and window is None and not return_lse
    is_flash = q.dtype in FLASH_DTYPES and q.shape[-1] == v.shape[-1]
    return is_whole and is_flash and q.device.type == "cpu" and not torch.compiler.is_compiling()


def sdpa_by_rows(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch time kv_heads head_dim"],
    v: Float[Tensor, "batch time kv_heads head_dim"],
    *,
    document_ids: Int[Tensor, "batch time"] | None,
    scale: float,
) -> Float[Tensor, "batch time heads head_dim"]:
    """Attend within documents, for tensors that satisfy `can_use_sdpa`.

    Rows up to MASKED_UP_TO keys are computed together, under a mask of their documents. In longer rows the
    blocked kernel computes those with several documents, because it multiplies no key of another document.
    """
    if document_ids is None:
        return _whole_rows(q, k, v, scale=scale, mask=None)
    time = q.shape[1]
    if time <= MASKED_UP_TO:
        sizes = {"time": time, "time_k": time, "device": q.device, "window": None}
        return _whole_rows(q, k, v, scale=scale, mask=visible_keys(**sizes, document_ids=document_ids)[:, None])
    is_single = document_ids[:, 0] == document_ids[:, -1]  # ids never decrease along a row
    single, others = is_single.nonzero()[:, 0], (~is_single).nonzero()[:, 0]
    if not len(others):
        return _whole_rows(q, k, v, scale=scale, mask=None)
    if not len(single):
        return blocked_attention(q, k, v, document_ids, scale, None, None, False)[0]
    alone = _whole_rows(*(x[single] for x in (q, k, v)), scale=scale, mask=None)
    mixed, _ = blocked_attention(*(x[others] for x in (q, k, v)), document_ids[others], scale, None, None, False)
    return torch.cat((alone, mixed))[torch.cat((single, others)).argsort()]


def _whole_rows(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """Attend to all earlier keys, or to those of the mask; each key/value head is repeated for its query heads.

    Torch's fast kernel on a CPU has no grouped heads: it would compute a matrix of all scores.
    """
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    return sdpa(q, k, v, scale=scale, is_causal=mask is None, mask=mask)
