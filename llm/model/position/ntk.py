"""Rotary positions with lower frequencies, so that a trained model can use longer contexts."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from llm.errors import ConfigError
from llm.model.position.log_n import LogNMode
from llm.model.position.rope import RoPE
from llm.model.position.rotary import check_factor, rotated_size


class NTKRoPE(RoPE):
    """RoPE with a larger base: the highest frequency stays, and the lowest is divided by `factor`.

        base' = base · factor^(head_dim / (head_dim − 2))

    Args:
        head_dim: size of a head; even, at least 4.
        base: wavelength base that the model was trained with.
        factor: target length over training length, at least 1; 1 is RoPE.
        log_n: see `Position`.
        train_length: see `Position`.
        rotary_share, turn_values: see `RoPE`.

    Raises:
        ConfigError: factor is below 1, or head_dim is 2, which leaves a single frequency.

    Source: bloc97, "NTK-Aware Scaled RoPE" (2023); YaRN, arXiv:2309.00071, section 3.1; as mixed radix
    kexue.fm/archives/9675.
    Differs: Su's radix exponent 2/head_dim divides the lowest frequency by slightly less than `factor`.
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
        self.factor = check_scaling(factor, rotated_size(head_dim, rotary_share))
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
        """Divide frequency m by factor^(m / (half − 1))."""
        half = len(frequencies)
        return frequencies * self.factor ** -(torch.arange(half, dtype=torch.float64) / (half - 1))


class NTKMixedRoPE(RoPE):
    """RoPE in a mixed radix: low frequencies are stretched more than high ones, and the lowest by `factor`.

        θ'_m = θ_m · exp(−a m^b),   a = ln(factor) / (head_dim / 2)^b,   m = 1 … head_dim / 2

    b = 0 divides all frequencies alike (position interpolation, arXiv:2306.15595); b = 1 raises the base and divides.

    Args:
        head_dim: size of a head; even, at least 4.
        base: wavelength base that the model was trained with.
        factor: target length over training length, at least 1; 1 is RoPE.
        exponent: b, in [0, 1].
        log_n: see `Position`.
        train_length: see `Position`.
        rotary_share, turn_values: see `RoPE`.

    Raises:
        ConfigError: factor is below 1, or exponent lies outside [0, 1].

    Source: Su Jianlin, "NTK-RoPE-mixed", kexue.fm/archives/9706.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        base: float,
        factor: float,
        exponent: float,
        log_n: LogNMode,
        train_length: int | None,
        rotary_share: float = 1.0,
        turn_values: bool = False,
    ) -> None:
        if not 0 <= exponent <= 1:
            raise ConfigError(f"model.position.exponent={exponent}: must lie in [0, 1]; 0.625 is the source's")
        self.factor, self.exponent = check_scaling(factor, rotated_size(head_dim, rotary_share)), exponent
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
        """Divide frequency m by factor^((m / half)^exponent), m from 1."""
        half = len(frequencies)
        share = torch.arange(1, half + 1, dtype=torch.float64) / half
        return frequencies * torch.exp(-math.log(self.factor) * share**self.exponent)


def check_scaling(factor: float, head_dim: int) -> float:
    """Return the factor, or raise ConfigError where it is below 1 or the head has fewer than two frequencies."""
    if head_dim < 4:
        raise ConfigError(f"model.head_dim={head_dim}: this position scales two frequencies or more; use at least 4")
    return check_factor(factor)
