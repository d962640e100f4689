"""Rotary positions whose distances are divided by a constant."""

from jaxtyping import Float
from torch import Tensor

from llm.model.position.log_n import LogNMode
from llm.model.position.rope import RoPE
from llm.model.position.rotary import check_factor


class LinearScalingRoPE(RoPE):
    """RoPE with every frequency divided by `factor`: θ'_m = θ_m / factor.

    A text `factor` times as long then has the angles that training saw.

    Args:
        head_dim: size of a head; even.
        base: wavelength base that the model was trained with.
        factor: target length over training length, at least 1; 1 is RoPE.
        log_n: see `Position`.
        train_length: see `Position`.
        rotary_share, turn_values: see `RoPE`.

    Raises:
        ConfigError: factor is below 1.

    Source: Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation",
    arXiv:2306.15595, eq. 4; `rope_type: linear` of Hugging Face.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        base: float,
        factor: float,
        log_n: LogNMode,
        train_length: int | None,
        rotary_share: float = 1.0,
        turn_values: bool = False,
    ) -> None:
        self.factor = check_factor(factor)
        super().__init__(
            head_dim=head_dim,
            base=base,
            log_n=log_n,
            train_length=train_length,
            rotary_share=rotary_share,
            turn_values=turn_values,
        )

    def reach(self, train_length: int) -> float:
        """Return `factor` times the training length."""
        return self.factor * train_length

    def choose_frequencies(self, frequencies: Float[Tensor, " half"]) -> Float[Tensor, " half"]:
        """Divide every frequency by the factor."""
        return frequencies / self.factor
