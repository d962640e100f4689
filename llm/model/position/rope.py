"""Rotary position embedding."""

from jaxtyping import Float
from torch import Tensor

from llm.contracts import PositionView
from llm.model.position.log_n import LogNMode
from llm.model.position.position_module import Position
from llm.model.position.rotary import AngleMemo, inverse_frequencies, rotate_first, rotated_size


class RoPE(Position):
    """Rotary positions: queries and keys are rotated by their positions, so that q_i·k_j depends on i − j alone.

        (R_i q)·(R_j k) = q · R_{j−i} k,   R_p rotates the pair m by the angle p · base^(−2m/head_dim)

    Args:
        head_dim: size of a head; even.
        base: wavelength base, above 1; larger for longer contexts.
        log_n: see `Position`.
        train_length: see `Position`.
        rotary_share: share of a head that turns, above 0 and at most 1: its first n = 2⌊share · head_dim / 2⌋ elements,
            with the frequencies of a head of size n. The others carry no position.
        turn_values: turn values as well, and outputs back: o_i = R_i⁻¹ Σ_j a_ij R_j v_j.

    Source: Su et al., "RoFormer", arXiv:2104.09864, eq. 16 and 34; layout in halves as in GPT-NeoX and Llama; share as
    in GPT-NeoX, arXiv:2204.06745, section 2.1; turned values of Su Jianlin, kexue.fm/archives/10862.
    """

    one_sided = ""

    def __init__(
        self,
        *,
        head_dim: int,
        base: float,
        log_n: LogNMode,
        train_length: int | None,
        rotary_share: float = 1.0,
        turn_values: bool = False,
    ) -> None:
        super().__init__(log_n=log_n, train_length=train_length)
        self.base, self.turns_values = base, turn_values
        turning = rotated_size(head_dim, rotary_share)
        self.frequencies = self.choose_frequencies(inverse_frequencies(head_dim=turning, base=base))
        self.angles = AngleMemo(self.amplitude)

    def choose_frequencies(self, frequencies: Float[Tensor, " half"]) -> Float[Tensor, " half"]:
        """Return the frequencies of rotation, given those of the base; scaled positions override this."""
        return frequencies

    def views(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[PositionView, ...]:
        """Return one view: queries and keys rotated by their positions."""
        cos, sin = self.angles(positions, self.frequencies)
        return (PositionView(q=rotate_first(q, cos, sin), k=rotate_first(k, cos, sin), min_distance=0),)

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate by the positions, as keys are."""
        return rotate_first(x, *self.angles(positions, self.frequencies))

    def turn_back(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate by the opposite angles, and undo the amplitude."""
        cos, sin = self.angles(positions, self.frequencies)
        squared = self.amplitude**2
        return rotate_first(x, cos / squared, -sin / squared)
