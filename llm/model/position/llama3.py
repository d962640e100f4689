"""Rotary positions scaled as in Llama 3.1."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from llm.errors import ConfigError
from llm.model.position.log_n import LogNMode
from llm.model.position.rope import RoPE
from llm.model.position.rotary import check_factor, check_original_length


class Llama3RoPE(RoPE):
    """RoPE with long wavelengths stretched by `factor`, short ones kept, and a linear blend between them.

        turns_m = original_context_length · θ_m / 2π
        s_m = clip((turns_m − low_freq_factor) / (high_freq_factor − low_freq_factor), 0, 1)
        θ'_m = (1 − s_m) θ_m / factor + s_m θ_m

    Args:
        head_dim: size of a head; even.
        base: wavelength base that the model was trained with.
        factor: how much long wavelengths are stretched, at least 1; 1 is RoPE.
        low_freq_factor: frequencies with fewer turns than this in the original context are divided by `factor`.
        high_freq_factor: frequencies with more turns than this stay; above low_freq_factor.
        original_context_length: tokens per window before the extension.
        log_n: see `Position`.
        train_length: see `Position`.
        rotary_share, turn_values: see `RoPE`.

    Raises:
        ConfigError: factor is below 1, the two bounds are not in ascending order above 0, or the length is below 1.

    Source: Llama 3.1, `apply_scaling` in meta-llama/llama-models, models/llama3/model.py; "The Llama 3 Herd of
    Models", arXiv:2407.21783, section 3.4.2; `rope_type: llama3` of Hugging Face.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        base: float,
        factor: float,
        low_freq_factor: float,
        high_freq_factor: float,
        original_context_length: int,
        log_n: LogNMode,
        train_length: int | None,
        rotary_share: float = 1.0,
        turn_values: bool = False,
    ) -> None:
        if not 0 < low_freq_factor < high_freq_factor:
            raise ConfigError(
                f"model.position.low_freq_factor={low_freq_factor}: must lie above 0 and below "
                f"model.position.high_freq_factor={high_freq_factor}; Llama 3.1 has 1 and 4"
            )
        self.factor = check_factor(factor)
        self.low_freq_factor, self.high_freq_factor = low_freq_factor, high_freq_factor
        self.original_context_length = check_original_length(original_context_length)
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
        """Divide low frequencies by the factor, keep high ones, and blend those between."""
        turns = self.original_context_length * frequencies / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return torch.lerp(frequencies / self.factor, frequencies, kept)
