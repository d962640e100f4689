"""Rotary position embedding."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from llm.contracts import PositionView
from llm.position.rotary import AngleMemo, inverse_frequencies, rotate


class RoPE(nn.Module):
    """Scores depend on distance: q_i and k_j are turned by their own positions, so q_i·k_j sees only i − j.

        (R_i q)·(R_j k) = q · R_{j−i} k,   R_p turns the pair m by the angle p · base^(−2m/head_dim)

    Args:
        head_dim: size of a head; even.
        base: wavelength base; larger for longer contexts.

    Source: Su et al., "RoFormer", arXiv:2104.09864, eq. 16 and 34; layout in halves as in GPT-NeoX and Llama.
    """

    def __init__(self, *, head_dim: int, base: float) -> None:
        super().__init__()
        self.frequencies = inverse_frequencies(head_dim=head_dim, base=base)
        self.angles = AngleMemo()

    def forward(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time kv_heads head_dim"],
        positions: Int[Tensor, "batch time"],
    ) -> tuple[PositionView, ...]:
        cos, sin = self.angles(positions, self.frequencies)
        return (PositionView(q=rotate(q, cos, sin), k=rotate(k, cos, sin), min_distance=0),)
