"""Rotary positions scaled by YaRN."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from llm.errors import ConfigError
from llm.model.position.log_n import LogNMode
from llm.model.position.rope import RoPE
from llm.model.position.rotary import check_factor, check_original_length


class YaRNRoPE(RoPE):
    """RoPE with low frequencies divided by `factor`, high ones kept, and longer queries and keys.

        dim(n) = head_dim · ln(original_context_length / 2πn) / (2 ln base)   the pair that turns n times
        s_m = clip((m − dim(beta_fast)) / (dim(beta_slow) − dim(beta_fast)), 0, 1)
        θ'_m = s_m θ_m / factor + (1 − s_m) θ_m,   q and k are multiplied by attention_factor

    Args:
        head_dim: size of a head; even.
        base: wavelength base that the model was trained with.
        factor: target length over training length, at least 1; 1 is RoPE.
        beta_fast: pairs that turn more often than this in the original context keep their frequency.
        beta_slow: pairs that turn less often than this are divided by `factor`; below beta_fast.
        original_context_length: tokens per window before the extension.
        attention_factor: factor on rotated queries and keys, above 0; None for the paper's 0.1 ln(factor) + 1.
        truncate: whether the two bounds on m are rounded outwards to whole pairs.
        log_n: see `Position`; with it, scores would be sharpened twice.
        train_length: see `Position`.
        rotary_share, turn_values: see `RoPE`.

    Raises:
        ConfigError: factor is below 1, the two bounds are not in ascending order above 0, the length is below 1,
            or attention_factor is not above 0.

    Source: Peng et al., "YaRN", arXiv:2309.00071, section 3.2 and eq. 21 and 22; `rope_type: yarn` of Hugging Face.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        base: float,
        factor: float,
        beta_fast: float,
        beta_slow: float,
        original_context_length: int,
        attention_factor: float | None,
        truncate: bool,
        log_n: LogNMode,
        train_length: int | None,
        rotary_share: float = 1.0,
        turn_values: bool = False,
    ) -> None:
        check_yarn(beta_fast=beta_fast, beta_slow=beta_slow, attention_factor=attention_factor)
        self.factor, self.beta_fast, self.beta_slow = check_factor(factor), beta_fast, beta_slow
        self.original_context_length = check_original_length(original_context_length)
        self.truncate = truncate
        self.amplitude = yarn_amplitude(factor) if attention_factor is None else attention_factor
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
        low, high = self._bounds(2 * len(frequencies))
        pairs = torch.arange(len(frequencies), dtype=torch.float64)
        stretched = ((pairs - low) / (high - low)).clamp(0, 1)
        return torch.lerp(frequencies, frequencies / self.factor, stretched)

    def _bounds(self, head_dim: int) -> tuple[float, float]:
        """Return the pairs between which frequencies are blended."""
        low, high = (
            head_dim * math.log(self.original_context_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return low, high if high != low else high + 0.001  # as Hugging Face does; a step in place of a ramp


def yarn_amplitude(factor: float, mscale: float = 1.0) -> float:
    """Return the paper's factor on queries and keys, 0.1 · mscale · ln(factor) + 1, or 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def check_yarn(*, beta_fast: float, beta_slow: float, attention_factor: float | None) -> None:
    """Raise ConfigError for bounds that are not in ascending order above 0, or a factor that is not above 0."""
    if not 0 < beta_slow < beta_fast:
        raise ConfigError(
            f"model.position.beta_slow={beta_slow}: must lie above 0 and below model.position.beta_fast={beta_fast}; "
            "1 and 32 are the paper's"
        )
    if attention_factor is not None and attention_factor <= 0:
        raise ConfigError(
            f"model.position.attention_factor={attention_factor}: must be above 0, or null for 0.1 ln(factor) + 1"
        )
