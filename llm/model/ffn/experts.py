"""Defines the experts of a layer as stacks of projections, and the slow form that tests compare with."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llm.model.ffn.grouped import expert_ffn
from llm.model.ffn.routing import ExpertOrder, Routing, sort_by_expert
from llm.model.ffn.row_sums import GatherRows, SumRows
from llm.ops.situ import Caps, gated_units

RMS_EPSILON = 1e-6
"""Value added to the mean square of an expert's output where outputs are normalised, against division by 0."""


class ExpertStack(nn.Module):
    """One projection of every expert, [experts, d_out, d_in], which Muon treats as a batch of matrices.

    Args:
        num_experts: number of matrices.
        d_in: input width.
        d_out: output width.
        active_fraction: share of the stack that a token uses, from which active parameters are counted.
    """

    parameter_kinds: ClassVar = {"weight": "matrix"}

    def __init__(self, *, num_experts: int, d_in: int, d_out: int, active_fraction: float) -> None:
        super().__init__()
        self.active_fraction = active_fraction
        self.weight = nn.Parameter(torch.empty(num_experts, d_out, d_in).normal_(0.0, d_in**-0.5))


class Experts(nn.Module):
    """The SwiGLU feed-forwards of all experts: each token passes through those that its router chose; none is dropped.

        y_t = Σ_e g_te E_e(x_t),   E_e(x) = W_down,e (silu(W_gate,e x) ⊙ W_up,e x)

    Args:
        d_model: width of the residual stream.
        d_expert: hidden width of an expert.
        num_experts: number of experts to choose from.
        top_k: experts per token, on average where the router decides the number.
        normalize_outputs: whether to scale each E_e(x) to unit root-mean-square, so that the gate weight alone is the
            size of its contribution and the router ranks experts by it.
        caps: those of SiTU-GLU in the place of SwiGLU, or None.

    Source: normalised outputs after Su, "MoE tour, part 1: from geometry", kexue.fm/archives/10699.
    """

    borrowed_parameters: ClassVar = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    """Parameters that this forward reads instead of their owners'; see `ParameterBorrower`."""

    def __init__(
        self,
        *,
        d_model: int,
        d_expert: int,
        num_experts: int,
        top_k: int,
        normalize_outputs: bool,
        caps: Caps | None = None,
    ) -> None:
        super().__init__()
        self.caps = caps
        self.num_experts, self.normalize_outputs = num_experts, normalize_outputs
        active = top_k / num_experts
        self.gate_proj = ExpertStack(num_experts=num_experts, d_in=d_model, d_out=d_expert, active_fraction=active)
        self.up_proj = ExpertStack(num_experts=num_experts, d_in=d_model, d_out=d_expert, active_fraction=active)
        self.down_proj = ExpertStack(num_experts=num_experts, d_in=d_expert, d_out=d_model, active_fraction=active)
        self.active_flops_per_token = 6.0 * d_model * d_expert * top_k

    def forward(
        self, x: Float[Tensor, "tokens d_model"], routing: Routing, *, has_empty_slots: bool
    ) -> tuple[Float[Tensor, "tokens d_model"], Float[Tensor, ""]]:
        """Return the outputs, and the largest hidden unit where units are bounded (else 0)."""
        order = sort_by_expert(routing.expert_ids, self.num_experts)
        x = x.to(product_dtype(x))
        weights = routing.gate_weights.flatten()[order.slot_ids, None]
        stacks = {"gate": self.gate_proj.weight, "up": self.up_proj.weight, "down": self.down_proj.weight}
        options = {"caps": self.caps, "has_empty_slots": has_empty_slots}
        if not self.normalize_outputs:
            return expert_ffn(x, weights, order, **stacks, **options)
        each_row = torch.arange(order.slot_ids.numel(), device=x.device)
        alone, places = ExpertOrder(token_ids=each_row, slot_ids=each_row, offsets=order.offsets), order.rows()
        tokens = GatherRows.apply(x, order.token_ids, places)
        y, largest = expert_ffn(tokens, torch.ones_like(weights), alone, **stacks, **options)
        y = F.rms_norm(y, y.shape[-1:], eps=RMS_EPSILON) * weights.to(y.dtype)
        return SumRows.apply(y, order.token_ids, places, x.shape[0]), largest


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products of x, which autocast may lower."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def loop_over_tokens(
    x: Float[Tensor, "tokens d_model"], routing: Routing, experts: Experts
) -> Float[Tensor, "tokens d_model"]:
    """Compute what `Experts` computes, one token and one slot at a time, for tests."""
    outputs = []
    for token, ids, weights in zip(x, routing.expert_ids.tolist(), routing.gate_weights, strict=True):
        total = torch.zeros_like(token)
        for expert, weight in zip(ids, weights, strict=True):
            if expert == experts.num_experts:
                continue
            gate, up = experts.gate_proj.weight[expert] @ token, experts.up_proj.weight[expert] @ token
            hidden = gated_units(gate, up, experts.caps)
            y = experts.down_proj.weight[expert] @ hidden
            if experts.normalize_outputs:
                y = F.rms_norm(y, y.shape, eps=RMS_EPSILON)
            total = total + weight.to(y.dtype) * y
        outputs.append(total)
    return torch.stack(outputs)
