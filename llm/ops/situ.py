"""The bounded gated activation SiTU-GLU, fused on CPUs, next to the plain form that defines it."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llm.ops.functional import WORTHWHILE, row_spans, runs_fused, swiglu


class Caps(NamedTuple):
    """The bounds of SiTU-GLU: no hidden unit exceeds their product."""

    gate: float
    up: float


def gated_units(
    gate: Float[Tensor, "*shape d_ff"], up: Float[Tensor, "*shape d_ff"], caps: Caps | None
) -> Float[Tensor, "*shape d_ff"]:
    """Return the hidden units of a gated feed-forward: SiTU-GLU with caps, SwiGLU without."""
    return swiglu(gate, up) if caps is None else situ_glu(gate, up, caps)


def situ_glu(
    gate: Float[Tensor, "*shape d_ff"], up: Float[Tensor, "*shape d_ff"], caps: Caps
) -> Float[Tensor, "*shape d_ff"]:
    """Return b₁ tanh(gate/b₁) σ(gate) ⊙ b₂ tanh(up/b₂), computed in at least fp32 and returned in the dtype of gate.

    Source: Su Jianlin, kexue.fm/archives/11848.
    """
    if not runs_fused(gate, WORTHWHILE):
        return plain_situ_glu(gate, up, caps)
    return FusedSituGLU.apply(gate, up, caps)


def plain_situ_glu(gate: Tensor, up: Tensor, caps: Caps) -> Tensor:
    """Compute the function by plain operations: the definition."""
    g, u = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (gate, up))
    return (caps.gate * torch.tanh(g / caps.gate) * g.sigmoid() * (caps.up * torch.tanh(u / caps.up))).to(gate.dtype)


def situ_slopes(gate: Tensor, up: Tensor, caps: Caps) -> tuple[Tensor, Tensor, Tensor]:
    """Return the hidden units and their derivatives by gate and by up, in at least fp32.

    With p = tanh(g/b₁), r = σ(g), w = tanh(u/b₂): h = b₁ p r b₂ w, ∂h/∂g = ((1 − p²) r + b₁ p r (1 − r)) b₂ w and
    ∂h/∂u = b₁ p r (1 − w²).
    """
    g, u = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (gate, up))
    p, r, w = (g / caps.gate).tanh_(), g.sigmoid(), (u / caps.up).tanh_()
    bounded, height = p * r * caps.gate, w * caps.up
    by_gate = (1 - p.square()).mul_(r).addcmul_(bounded, 1 - r).mul_(height)
    return bounded * height, by_gate, (1 - w.square_()).mul_(bounded)


class FusedSituGLU(torch.autograd.Function):
    """SiTU-GLU in pieces that stay in the cache; the backward pass stores only gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, caps: Caps) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(gate, up)
        ctx.caps = caps
        out = torch.empty(gate.shape, dtype=gate.dtype)
        gates, ups, outs = (x.reshape(-1, x.shape[-1]) for x in (gate, up, out))
        for span in row_spans(gates):
            outs[span] = plain_situ_glu(gates[span], ups[span], caps)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return d gate and d up."""
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(up.shape, dtype=up.dtype)
        slopes, gates, ups, grad_gates, grad_ups = (
            x.reshape(-1, x.shape[-1]) for x in (grad, gate, up, grad_gate, grad_up)
        )
        for span in row_spans(gates):
            _, by_gate, by_up = situ_slopes(gates[span], ups[span], ctx.caps)
            grad_gates[span] = by_gate.mul_(slopes[span])
            grad_ups[span] = by_up.mul_(slopes[span])
        return grad_gate, grad_up, None
