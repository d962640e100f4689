"""Applies all experts of a layer: with grouped products on a GPU, and with a loop over experts elsewhere."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from llm.model.ffn.activation import largest_size
from llm.model.ffn.expert_loop import expert_loop
from llm.model.ffn.routing import ExpertOrder
from llm.model.ffn.row_sums import GatherRows, SumRows
from llm.ops.situ import Caps, plain_situ_glu

ALIGNMENT = 8
"""Grouped products in bf16 need widths that are multiples of this number, which is 16 bytes."""


def expert_ffn(
    x: Float[Tensor, "tokens d_model"],
    row_weights: Float[Tensor, "rows 1"],
    order: ExpertOrder,
    *,
    gate: Float[Tensor, "experts d_expert d_model"],
    up: Float[Tensor, "experts d_expert d_model"],
    down: Float[Tensor, "experts d_model d_expert"],
    has_empty_slots: bool,
    caps: Caps | None = None,
) -> tuple[Float[Tensor, "tokens d_model"], Float[Tensor, ""]]:
    """Return each token's weighted sum of its experts' outputs, y_t = Σ_e w_te W_down,e (silu(W_gate,e x) ⊙ W_up,e x).

    The second result is the largest hidden unit of SiTU-GLU, and 0 for SwiGLU.

    Args:
        x: tokens, in the precision of the products.
        row_weights: weight of each row.
        order: rows sorted by expert.
        gate, up, down: stacked projections, in the precision of x or a wider one.
        has_empty_slots: whether there may be rows after those of the last expert.
        caps: those of SiTU-GLU, or None for SwiGLU.
    """
    if can_group(x, gate):
        return grouped_products(x, row_weights, order, gate, up, down, has_empty_slots, caps)
    numbers = (0.0, 0.0) if caps is None else caps
    y, _, largest = expert_loop(x, row_weights, order.token_ids, order.offsets, gate, up, down, *numbers)
    return y, largest.detach()


def can_group(x: Tensor, gate: Tensor) -> bool:
    """Whether `F.grouped_mm` has a fast kernel for these tensors."""
    aligned = x.shape[1] % ALIGNMENT == 0 and gate.shape[1] % ALIGNMENT == 0
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm")


def grouped_products(
    x: Tensor,
    row_weights: Tensor,
    order: ExpertOrder,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    has_empty_slots: bool,
    caps: Caps | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply all experts in three grouped products, without synchronizing with the device to count their tokens.

    The weight multiplies the hidden vector, which is narrower than the output and saved for the backward pass anyway.
    """
    has_tokens = torch.diff(order.offsets, prepend=order.offsets.new_zeros(1)) > 0
    gate, up, down = (_used(weight.to(x.dtype), has_tokens).transpose(1, 2) for weight in (gate, up, down))
    filled = (torch.arange(order.slot_ids.numel(), device=x.device) < order.offsets[-1])[:, None]
    places = order.rows()
    rows = GatherRows.apply(x, order.token_ids, places)
    if has_empty_slots:  # grouped products leave rows without a group unwritten, in both directions
        rows = torch.where(filled, rows, 0)
    gated, upped = (F.grouped_mm(rows, weight, offs=order.offsets) for weight in (gate, up))
    hidden = F.silu(gated) * upped if caps is None else plain_situ_glu(gated, upped, caps)
    if has_empty_slots:
        hidden = torch.where(filled, hidden, 0)
    largest = largest_size(hidden) if caps is not None else hidden.new_zeros((), dtype=torch.float32)
    weighted = hidden * row_weights.to(x.dtype)
    if has_empty_slots:  # the gradient of an unwritten row may be NaN, and times a hidden vector of 0 it would stay so
        weighted = torch.where(filled, weighted, 0)
    out = F.grouped_mm(weighted, down, offs=order.offsets)
    if has_empty_slots:
        out = torch.where(filled, out, 0)
    return SumRows.apply(out, order.token_ids, places, x.shape[0]), largest


def _used(
    stack: Float[Tensor, "experts rows columns"], has_tokens: Bool[Tensor, " experts"]
) -> Float[Tensor, "experts rows columns"]:
    """Return a stack whose gradient is 0 for experts without tokens, which grouped products may leave unwritten."""
    return torch.where(has_tokens[:, None, None], stack, 0)
