"""Causal attention by positive features in chunks, in logarithms, so that no query or key overflows."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.model.attention.states import Documents, carry_states

EMPTY = -1e30
"""The running maximum of an empty state: finite, because differences of infinities would be NaN."""


def chunked_performer(
    log_q: Float[Tensor, "batch time heads features"],
    log_k: Float[Tensor, "batch time kv_heads features"],
    v: Float[Tensor, "batch time kv_heads value_dim"],
    *,
    document_ids: Int[Tensor, "batch time"],
    chunk_size: int,
    initial: dict[str, Tensor],
    before: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch time heads value_dim"], dict[str, Tensor]]:
    """Return o_i = Σ_j w_ij v_j / Σ_j w_ij with w_ij = Σ_f exp(log_q_if + log_k_jf), j ≤ i, and the last state.

    Pairs inside a chunk are scored by log w_ij, shifted by the maxima of their own query and key. Earlier chunks are a
    state of sums, each feature shifted by its largest key so far. Both parts are merged by their log-sum-exp. No shift
    depends on a later token. Inside a chunk, weights below e^−87 times the product of the largest query feature and
    the largest key feature are clamped to that value, the smallest in fp32. Attention under qk_norm stays far above it.

    Args:
        log_q: logarithms of query features; consecutive heads share a key/value head.
        log_k: logarithms of key features.
        v: values.
        document_ids: document of each token, ascending along a row.
        chunk_size: tokens per chunk; time need not be a multiple.
        initial: state before the first token: `sums` [batch kv_heads features value_dim + 1] of values and weights
            times exp(−maxima), and `maxima` [batch kv_heads features].
        before: document of that state.
    """
    time = log_q.shape[1]
    whole = time // chunk_size * chunk_size
    if 0 < whole < time:  # a shorter chunk at the end
        mixed, state = [], initial
        for part in (slice(0, whole), slice(whole, time)):
            out, state = chunked_performer(
                log_q[:, part], log_k[:, part], v[:, part], document_ids=document_ids[:, part], chunk_size=chunk_size,
                initial=state, before=before if part.start == 0 else document_ids[:, whole - 1],
            )  # fmt: skip
            mixed.append(out)
        return torch.cat(mixed, dim=1), state
    size = min(chunk_size, time)
    documents = Documents.cut(document_ids, size=size, before=before)
    log_q = log_q.unflatten(2, (log_k.shape[2], -1))
    log_q, log_k, v = (x.unflatten(1, (-1, size)) for x in (log_q, log_k, v))
    sums, maxima = _states(log_k, v, documents, initial)
    inside, inside_lse = _inside(log_q, log_k, v, documents)
    past, past_lse = _from_state(log_q, sums[:-1], maxima[:-1])
    share = torch.where(documents.reads[..., None, None], torch.sigmoid(inside_lse - past_lse), 1.0)[..., None]
    mixed = share * inside + (1 - share) * past
    return mixed.flatten(1, 2).flatten(2, 3), {"sums": sums[-1], "maxima": maxima[-1]}


def _states(log_k: Tensor, v: Tensor, documents: Documents, initial: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return sums and maxima before each chunk and after the last, chunks first."""
    log_k = log_k.masked_fill(~documents.is_carried[..., None, None], float("-inf"))
    with torch.no_grad():  # maxima are shifts that cancel, so they carry no gradient
        largest = log_k.amax(dim=2).transpose(0, 1)
        continues = documents.continues.transpose(0, 1)[..., None, None]
        maxima = [initial["maxima"]]
        for n in range(len(largest)):
            maxima.append(torch.maximum(torch.where(continues[n], maxima[-1], EMPTY), largest[n]))
        maxima = torch.stack(maxima)
        keep = torch.where(continues, torch.exp(maxima[:-1] - maxima[1:]), 0.0)[..., None]
    weights = torch.exp(log_k - maxima[1:].transpose(0, 1)[:, :, None])
    values = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
    updates = torch.einsum("bcjgf,bcjgd->cbgfd", weights, values)
    return carry_states(keep, updates, initial["sums"]), maxima


def _inside(log_q: Tensor, log_k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
    """Mix the values of a token's own chunk by log weights; return them with the log-sum-exp of the weights."""
    top_q, top_k = (x.detach().amax(-1, keepdim=True) for x in (log_q, log_k))
    weights = torch.einsum("bcignf,bcjgf->bcgnij", torch.exp(log_q - top_q), torch.exp(log_k - top_k))
    scores = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
    scores = scores + top_k[..., 0].permute(0, 1, 3, 2)[:, :, :, None, None, :]
    scores = scores.masked_fill(~documents.visible[:, :, None, None], float("-inf"))
    lse = scores.logsumexp(-1).permute(0, 1, 4, 2, 3)
    return torch.einsum("bcgnij,bcjgd->bcignd", scores.softmax(-1), v), lse + top_q[..., 0]


def _from_state(log_q: Tensor, sums: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
    """Mix the values of the state that each chunk receives, and return the log-sum-exp of their weights."""
    shifted = log_q + maxima.transpose(0, 1)[:, :, None, :, None]
    top = shifted.detach().amax(-1, keepdim=True)
    read = torch.einsum("bcignf,cbgfd->bcignd", torch.exp(shifted - top), sums)
    total = read[..., -1:].clamp_min(torch.finfo(read.dtype).tiny)
    return read[..., :-1] / total, (total.log() + top)[..., 0]
