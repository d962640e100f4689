"""The gated delta rule: token by token, which defines it, and in chunks, with one state between chunks."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llm.model.attention.states import Documents

GATE_ROWS = 16
"""Rows of a block under channel gates: with a log gate of at least −5 per token, no factor exceeds e^80 in fp32."""

LARGEST_EXPONENT = 80.0
"""Bound on exponents of pairs in different documents, which are masked afterwards: they must stay finite in fp32."""


def recurrent_delta(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch time kv_heads head_dim"],
    v: Float[Tensor, "batch time kv_heads value_dim"],
    write: Float[Tensor, "batch time kv_heads"],
    log_keep: Float[Tensor, "batch time kv_heads features"],
    *,
    document_ids: Int[Tensor, "batch time"],
    initial: Float[Tensor, "batch kv_heads head_dim value_dim"],
    before: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch kv_heads head_dim value_dim"]]:
    """Return o_i = S_iᵀ q_i with S_i = Diag(e^{g_i}) S_{i−1} + k_i u_iᵀ, and the last state: the slow definition.

        u_i = w_i (v_i − (Diag(e^{g_i}) S_{i−1})ᵀ k_i),   S = 0 where a document starts

    Args:
        q: queries; consecutive heads share a key/value head.
        k: keys of unit length.
        v: values.
        write: w, the strength of writing.
        log_keep: g ≤ 0, one per head (features = 1) or per feature of the key.
        document_ids: document of each token, ascending along a row.
        initial: state before the first token.
        before: document of that state.

    Source: Yang et al., "Gated Delta Networks", arXiv:2412.06464, eq. 10; channel gates of Kimi Linear,
    arXiv:2510.26692; Su Jianlin, kexue.fm/archives/11033 and 11486.
    """
    group, state, outputs = q.shape[2] // k.shape[2], initial, []
    previous = before
    for i in range(q.shape[1]):
        same = (document_ids[:, i] == previous)[:, None, None, None]
        state = torch.where(same, state, 0.0) * log_keep[:, i].exp()[..., None]
        held = torch.einsum("bged,bge->bgd", state, k[:, i])
        change = write[:, i, :, None] * (v[:, i] - held)
        state = state + k[:, i, :, :, None] * change[:, :, None]
        queries = q[:, i].unflatten(1, (-1, group))
        outputs.append(torch.einsum("bged,bgne->bgnd", state, queries).flatten(1, 2))
        previous = document_ids[:, i]
    return torch.stack(outputs, dim=1), state


def chunked_delta(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch time kv_heads head_dim"],
    v: Float[Tensor, "batch time kv_heads value_dim"],
    write: Float[Tensor, "batch time kv_heads"],
    log_keep: Float[Tensor, "batch time kv_heads features"],
    *,
    document_ids: Int[Tensor, "batch time"],
    chunk_size: int,
    initial: Float[Tensor, "batch kv_heads head_dim value_dim"],
    before: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch kv_heads head_dim value_dim"]]:
    """Return what `recurrent_delta` returns, by products inside chunks and one triangular solve per chunk.

        A = strictly lower (w_i k_i·k_j Γ_ij),  P = lower (q_i·k_j Γ_ij),  Γ_ij = e^{b_i − b_j},  b the sums of g
        (I + A) [U | Y] = Diag(w) [V | K e^b],   V' = U − Y S,   O = (Q e^b) S + P V',   S' = e^{b_C} S + K̃ᵀ V'

    Arguments: see `recurrent_delta`.

    Source: Yang et al., arXiv:2412.06464, section 3.3, and arXiv:2406.06484, section 3.
    """
    time = q.shape[1]
    size = min(chunk_size, time)
    short = -time % size
    if short:  # tokens that write nothing and keep all complete the last chunk
        q, k, v, log_keep = (F.pad(x, (0, 0, 0, 0, 0, short)) for x in (q, k, v, log_keep))
        write = F.pad(write, (0, 0, 0, short))
        document_ids = torch.cat((document_ids, document_ids[:, -1:].expand(-1, short)), dim=1)
    documents = Documents.cut(document_ids, size=size, before=before)
    # [batch chunks kv_heads (group) size width]
    k, v, log_keep = (x.unflatten(1, (-1, size)).transpose(2, 3) for x in (k, v, log_keep))
    q = q.unflatten(2, (k.shape[2], -1)).unflatten(1, (-1, size)).movedim(2, 4)
    write = write.unflatten(1, (-1, size)).transpose(2, 3)[..., None]
    reads, carried = documents.reads[:, :, None, :, None], documents.is_carried[:, :, None, :, None]
    visible = documents.visible[:, :, None]
    sums = visible.to(log_keep.dtype) @ log_keep  # within a document, so that no other one changes their rounding
    kept = torch.where(reads, sums.exp(), 0.0)
    pairs = gated_products(torch.cat((k[:, :, :, None], q), dim=3), k, sums, documents.ids)
    own = write * pairs[:, :, :, 0].tril(-1) * visible
    rhs = write * torch.cat((v, k * kept), dim=-1)
    solved = torch.linalg.solve_triangular(own, rhs, upper=False, unitriangular=True)
    values, taken = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    passed = torch.where(carried, k * (sums[:, :, :, -1:] - sums).clamp_max(0).exp(), 0.0)
    keep = documents.continues[:, :, None, None, None] * sums[:, :, :, -1].exp()[..., None]
    parts = (keep, passed, values, taken)
    states = _CarryDelta.apply(*(part.transpose(0, 1) for part in parts), initial)
    old = states[:-1].transpose(0, 1)
    new = values - taken @ old
    inside = pairs[:, :, :, 1:].tril() * visible[:, :, :, None]
    out = (q * kept[:, :, :, None]) @ old[:, :, :, None] + inside @ new[:, :, :, None]
    return out.movedim(4, 2).flatten(1, 2).flatten(2, 3)[:, :time], states[-1]


def gated_products(
    rows: Float[Tensor, "batch chunks kv_heads kinds size head_dim"],
    k: Float[Tensor, "batch chunks kv_heads size head_dim"],
    sums: Float[Tensor, "batch chunks kv_heads size features"],
    ids: Int[Tensor, "batch chunks size"],
) -> Float[Tensor, "batch chunks kv_heads kinds size size"]:
    """Return Σ_e rows_ie k_je e^{b_ie − b_je} for j ≤ i of one document; other entries are finite and have no meaning.

    Channel gates stand inside the sum. Blocks of rows take the sums at their first token as reference for its document
    and 0 for later ones, so that factors of rows are at most 1 and those of columns at most e^80.
    """
    if sums.shape[-1] == 1:
        between = (sums - sums.transpose(-1, -2)).clamp_max(0).exp()
        return (rows @ k.transpose(-1, -2)[:, :, :, None]) * between[:, :, :, None]
    size, blocks = k.shape[3], []
    for start in range(0, size, GATE_ROWS):
        end = min(start + GATE_ROWS, size)
        is_first = (ids[:, :, :end] == ids[:, :, start : start + 1])[:, :, None, :, None]
        reference = torch.where(is_first, sums[:, :, :, start : start + 1], 0.0)
        upper = rows[..., start:end, :] * (sums[:, :, :, start:end] - reference[:, :, :, start:]).exp()[:, :, :, None]
        lower = k[:, :, :, :end] * (reference - sums[:, :, :, :end]).clamp_max(LARGEST_EXPONENT).exp()
        blocks.append(F.pad(upper @ lower.transpose(-1, -2)[:, :, :, None], (0, size - end)))
    return torch.cat(blocks, dim=-2)


class _CarryDelta(torch.autograd.Function):
    """The recurrence S_{n+1} = keep_n ⊙ S_n + K̃_nᵀ (U_n − Y_n S_n) over chunks; it saves only the states.

    Backward, with R the gradient of S_{n+1}: V̄ = K̃ R, then R ← keep ⊙ R − Yᵀ V̄ + the gradient of S_n itself.
    """

    @staticmethod
    def forward(ctx: Any, keep: Tensor, passed: Tensor, values: Tensor, taken: Tensor, initial: Tensor) -> Tensor:
        states = values.new_empty(len(values) + 1, *initial.shape)
        states[0] = initial
        for n in range(len(values)):
            new = values[n] - taken[n] @ states[n]
            torch.add(keep[n] * states[n], passed[n].transpose(-1, -2) @ new, out=states[n + 1])
        ctx.save_for_backward(keep, passed, values, taken, states)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        keep, passed, values, taken, states = ctx.saved_tensors
        (grad_states,) = grads
        later, grad_values = torch.empty_like(states[1:]), torch.empty_like(values)
        running = grad_states[-1]
        for n in range(len(values) - 1, -1, -1):
            later[n] = running
            grad_values[n] = passed[n] @ running
            running = keep[n] * running - taken[n].transpose(-1, -2) @ grad_values[n] + grad_states[n]
        old = states[:-1]
        grad_passed = (values - taken @ old) @ later.transpose(-1, -2)
        grad_taken = -grad_values @ old.transpose(-1, -2)
        grad_keep = (later * old).sum_to_size(keep.shape)
        return grad_keep, grad_passed, grad_values, grad_taken, running
