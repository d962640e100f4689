"""Linear attention in chunks: products inside a chunk, and one state between chunks."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.model.attention.states import Documents, carry_states


def chunked_linear(
    q: Float[Tensor, "batch time heads features"],
    k: Float[Tensor, "batch time kv_heads features"],
    v: Float[Tensor, "batch time kv_heads value_dim"],
    *,
    document_ids: Int[Tensor, "batch time"],
    log_decay: Float[Tensor, " kv_heads"] | Float[Tensor, "batch time kv_heads"] | None,
    chunk_size: int,
    initial: Float[Tensor, "batch kv_heads features value_dim"],
    before: Int[Tensor, " batch"],
) -> tuple[
    Float[Tensor, "batch time heads value_dim"],
    Float[Tensor, "batch kv_heads features value_dim"],
]:
    """Return o_i = q_iᵀ S_i with S_i = γ S_{i−1} + k_i v_iᵀ, reset where a document starts, and the last state.

    Args:
        q: query features; consecutive heads share a key/value head.
        k: key features.
        v: values.
        document_ids: document of each token, ascending along a row.
        log_decay: log γ <= 0 per key/value head, of all tokens or of each; None for γ = 1.
        chunk_size: tokens per chunk; time need not be a multiple.
        initial: state before the first token.
        before: document of that state.

    Source: Yang et al., "Gated Linear Attention", arXiv:2312.06635, section 4.1 (the chunkwise form).
    """
    whole = q.shape[1] // chunk_size * chunk_size
    if 0 < whole < q.shape[1]:  # a shorter chunk at the end
        parts = [slice(0, whole), slice(whole, None)]
        is_per_token = log_decay is not None and log_decay.ndim == 3
        decays = [log_decay[:, part] if is_per_token and log_decay is not None else log_decay for part in parts]
        head, state = chunked_linear(
            *(x[:, parts[0]] for x in (q, k, v)),
            document_ids=document_ids[:, parts[0]], initial=initial, before=before, log_decay=decays[0],
            chunk_size=chunk_size,
        )  # fmt: skip
        tail, state = chunked_linear(
            *(x[:, parts[1]] for x in (q, k, v)),
            document_ids=document_ids[:, parts[1]], initial=state, before=document_ids[:, whole - 1],
            log_decay=decays[1], chunk_size=chunk_size,
        )  # fmt: skip
        return torch.cat((head, tail), dim=1), state
    size = min(chunk_size, q.shape[1])
    documents = Documents.cut(document_ids, size=size, before=before)
    q, k, v = (x.unflatten(1, (-1, size)) for x in (q.unflatten(2, (k.shape[2], -1)), k, v))
    decay = None
    if log_decay is not None:
        is_shared = log_decay.ndim == 1
        decay = Decay(log_decay, size) if is_shared else TokenDecay(log_decay.unflatten(1, (-1, size)), documents)
    states = carry_states(_keep(documents, decay), _updates(k, v, documents, decay).transpose(0, 1), initial)
    mixed = _inside(q, k, v, documents, decay) + _from_state(q, states[:-1], documents, decay)
    return mixed.flatten(1, 2).flatten(2, 3), states[-1]


class Decay:
    """The powers of γ inside a chunk; no exponent of e is positive, so nothing overflows.

    Args:
        log_decay: log γ per key/value head.
        size: tokens per chunk.
    """

    def __init__(self, log_decay: Float[Tensor, " kv_heads"], size: int) -> None:
        steps = torch.arange(size, device=log_decay.device)
        distance = steps[:, None] - steps[None, :]
        self.between = torch.exp(log_decay[:, None, None] * distance.clamp_min(0))[:, None]
        """γ^(i−j), [kv_heads 1 size size], for i ≥ j."""
        self.since_start = torch.exp(log_decay * (steps[:, None] + 1))
        """γ^(i+1), [size kv_heads]."""
        self.until_end = torch.exp(log_decay * (size - 1 - steps[:, None]))
        """γ^(size−1−j), [size kv_heads]."""
        self.whole = torch.exp(log_decay * size)
        """γ^size, [kv_heads]."""


class TokenDecay:
    """Products of the decays of each token inside a chunk, which `Decay` has for one decay of all tokens.

    Args:
        log_decay: log γ of each token.
        documents: documents of the chunks; sums stay inside one, so that no other document changes their rounding.
    """

    def __init__(self, log_decay: Float[Tensor, "batch chunks size kv_heads"], documents: Documents) -> None:
        sums = documents.visible.to(log_decay.dtype) @ log_decay
        heads = sums.movedim(3, 2)
        self.between = torch.exp((heads[..., :, None] - heads[..., None, :]).clamp_max(0))[:, :, :, None]
        """Product of the decays after j up to i, [batch chunks kv_heads 1 size size], for i ≥ j."""
        self.since_start = torch.exp(sums)
        """Product up to i, [batch chunks size kv_heads]."""
        self.until_end = torch.exp((sums[:, :, -1:] - sums).clamp_max(0))
        """Product after j, [batch chunks size kv_heads], for tokens of the last document."""
        self.whole = torch.exp(sums[:, :, -1]).transpose(0, 1)
        """Product over the chunk, [chunks batch kv_heads]."""


def _inside(q: Tensor, k: Tensor, v: Tensor, documents: Documents, decay: Decay | TokenDecay | None) -> Tensor:
    """Mix the values of a token's own chunk; q is [batch chunks size kv_heads group features]."""
    weights = torch.einsum("bcigne,bcjge->bcgnij", q, k)
    if decay is not None:
        weights = weights * decay.between
    weights = weights * documents.visible[:, :, None, None]
    return torch.einsum("bcgnij,bcjgd->bcignd", weights, v)


def _from_state(q: Tensor, states: Tensor, documents: Documents, decay: Decay | TokenDecay | None) -> Tensor:
    """Read the state that each chunk receives, where it belongs to the token's own document."""
    mixed = torch.einsum("bcigne,cbged->bcignd", q, states)
    if decay is not None:
        mixed = mixed * decay.since_start[..., None, None]
    return torch.where(documents.reads[..., None, None, None], mixed, 0.0)


def _updates(k: Tensor, v: Tensor, documents: Documents, decay: Decay | TokenDecay | None) -> Tensor:
    """Return what each chunk adds to the state, [batch chunks kv_heads features value_dim]."""
    k = torch.where(documents.is_carried[..., None, None], k, 0.0)
    if decay is not None:
        k = k * decay.until_end[..., None]
    return torch.einsum("bcjge,bcjgd->bcged", k, v)


def _keep(documents: Documents, decay: Decay | TokenDecay | None) -> Tensor:
    """Return the factor on the state through each chunk, [chunks batch kv_heads or 1, 1, 1]."""
    keep = documents.continues.transpose(0, 1)[..., None, None, None]
    return keep.float() if decay is None else keep * decay.whole[..., None, None]
