"""Rotary position embedding."""

from jaxtyping import Float
from torch import Tensor

from llm.contracts import PositionView
from llm.model.position.log_n import LogNMode
from llm.model.position.position_module import Position
from llm.model.position.rotary import AngleMemo, inverse_frequencies
from llm.ops.functional import rotate


class RoPE(Position):
    """Rotary positions: queries and keys are rotated by their positions, so that q_i·k_j depends on i − j alone.

        (R_i q)·(R_j k) = q · R_{j−i} k,   R_p rotates the pair m by the angle p · base^(−2m/head_dim)

    Args:
        head_dim: size of a head; even.
        base: wavelength base, above 1; larger for longer contexts.
        log_n: see `Position`.
        train_length: see `Position`.

    Source: Su et al., "RoFormer", arXiv:2104.09864, eq. 16 and 34; layout in halves as in GPT-NeoX and Llama.
    """

    one_sided = ""

    def __init__(self, *, head_dim: int, base: float, log_n: LogNMode, train_length: int | None) -> None:
        super().__init__(log_n=log_n, train_length=train_length)
        self.base = base
        self.frequencies = self.choose_frequencies(inverse_frequencies(head_dim=head_dim, base=base))
        self.angles = AngleMemo(self.amplitude)

    def choose_frequencies(self, frequencies: Float[Tensor, " half"]) -> Float[Tensor, " half"]:
        """Return the frequencies of rotation, given those of the base; scaled positions override this."""
        return frequencies

    def views(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[PositionView, ...]:
        """Return one view: queries and keys rotated by their positions."""
        cos, sin = self.angles(positions, self.frequencies)
        return (PositionView(q=rotate(q, cos, sin), k=rotate(k, cos, sin), min_distance=0),)
