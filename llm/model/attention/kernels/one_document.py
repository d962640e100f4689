"""Causal attention on a CPU with torch's own kernel for the rows that hold one document, and blocks for the others."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.model.attention.kernels.blocked import blocked_attention
from llm.model.attention.kernels.cuda import sdpa

FLASH_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes for which torch's attention on a CPU stores no time x time matrix."""


def can_use_sdpa(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, return_lse: bool) -> bool:
    """Return whether torch's kernel can compute rows of one document, eagerly and without a matrix of all scores."""
    is_whole = q.shape[1] == k.shape[1] and window is None and not return_lse
    is_flash = q.dtype in FLASH_DTYPES and q.shape[-1] == v.shape[-1] and q.shape[2] == k.shape[2]
    return is_whole and is_flash and q.device.type == "cpu" and not torch.compiler.is_compiling()


def sdpa_by_rows(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch time heads head_dim"],
    v: Float[Tensor, "batch time heads head_dim"],
    *,
    document_ids: Int[Tensor, "batch time"] | None,
    scale: float,
) -> Float[Tensor, "batch time heads head_dim"]:
    """Attend within documents, for tensors that satisfy `can_use_sdpa`."""
    if document_ids is None:
        return sdpa(q, k, v, scale=scale, is_causal=True, mask=None)
    is_single = document_ids[:, 0] == document_ids[:, -1]  # ids never decrease along a row
    single, others = is_single.nonzero()[:, 0], (~is_single).nonzero()[:, 0]
    if not len(others):
        return sdpa(q, k, v, scale=scale, is_causal=True, mask=None)
    if not len(single):
        return blocked_attention(q, k, v, document_ids, scale, None, None, False)[0]
    alone = sdpa(*(x[single] for x in (q, k, v)), scale=scale, is_causal=True, mask=None)
    mixed, _ = blocked_attention(*(x[others] for x in (q, k, v)), document_ids[others], scale, None, None, False)
    return torch.cat((alone, mixed))[torch.cat((single, others)).argsort()]
