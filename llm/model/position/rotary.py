"""Arithmetic that rotary positions share: frequencies, angles and checks of their settings."""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from llm.errors import ConfigError
from llm.ops.batch_memo import BatchMemo
from llm.ops.functional import rotate


def inverse_frequencies(*, head_dim: int, base: float) -> Float[Tensor, " half"]:
    """Return θ_m = base^(−2m/head_dim), m = 0 … head_dim/2 − 1, in fp64 so that long positions keep their phase.

    Raises:
        ConfigError: head_dim is odd, or base is not above 1.

    Source: Su et al., "RoFormer", arXiv:2104.09864, section 3.2.2.
    """
    if head_dim % 2:
        raise ConfigError(f"model.head_dim={head_dim}: rotary positions rotate pairs of elements; use an even head_dim")
    if base <= 1:
        raise ConfigError(f"model.position.base={base}: must be above 1; 10000 is usual")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return base**-exponents


def rotated_size(head_dim: int, rotary_share: float) -> int:
    """Return n = 2⌊rotary_share · head_dim / 2⌋, the elements of a head that turn.

    Raises:
        ConfigError: head_dim is odd and all of it turns, the share is outside (0, 1], or no pair of elements is left.
    """
    if not 0 < rotary_share <= 1:
        raise ConfigError(
            f"model.position.rotary_share={rotary_share}: must be above 0 and at most 1; 0.5 turns half of each head"
        )
    if rotary_share == 1:
        return head_dim
    turning = 2 * math.floor(rotary_share * head_dim / 2)
    if turning < 2:
        raise ConfigError(
            f"model.position.rotary_share={rotary_share}: turns no pair of a head of {head_dim}; set at least "
            f"{2 / head_dim:.4g}, or use model/position=none"
        )
    return turning


def rotate_first(
    x: Float[Tensor, "batch time heads head_dim"],
    cos: Float[Tensor, "#batch #time half"],
    sin: Float[Tensor, "#batch #time half"],
) -> Float[Tensor, "batch time heads head_dim"]:
    """Rotate the first 2 · half elements of each head, and keep the others."""
    turning = 2 * cos.shape[-1]
    if turning == x.shape[-1]:
        return rotate(x, cos, sin)
    return torch.cat((rotate(x[..., :turning], cos, sin), x[..., turning:]), dim=-1)


def check_factor(factor: float) -> float:
    """Return a factor on the context length, or raise ConfigError where it is below 1."""
    if factor < 1:
        raise ConfigError(f"model.position.factor={factor}: must be at least 1, target length over training length")
    return factor


def check_original_length(length: int) -> int:
    """Return the context length that a model was trained at, or raise ConfigError where it is below 1."""
    if length < 1:
        raise ConfigError(
            f"model.position.original_context_length={length}: must be at least 1; set the context_length of the "
            "training run"
        )
    return length


def cos_sin(
    positions: Shaped[Tensor, "batch time"], frequencies: Float[Tensor, " half"]
) -> tuple[Float[Tensor, "batch time half"], Float[Tensor, "batch time half"]]:
    """Return cos and sin of position · frequency in fp32; positions may be real numbers."""
    angles = positions[..., None].to(torch.float32) * frequencies.to(positions.device, torch.float32)
    return angles.cos(), angles.sin()


class AngleMemo:
    """A memo that computes an angle table once for all layers of a forward: it keeps the last positions' answer.

    Args:
        amplitude: factor on cos and sin.
    """

    def __init__(self, amplitude: float = 1.0) -> None:
        self.amplitude = amplitude
        self._last: BatchMemo[tuple[Tensor, Tensor]] = BatchMemo()

    def __call__(
        self, positions: Shaped[Tensor, "batch time"], frequencies: Float[Tensor, " half"]
    ) -> tuple[Tensor, Tensor]:
        return self._last((positions,), None, lambda: self._compute(positions, frequencies))

    def _compute(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin(positions, frequencies)
        return (cos, sin) if self.amplitude == 1 else (cos * self.amplitude, sin * self.amplitude)

    def __deepcopy__(self, _memo: dict) -> "AngleMemo":
        return AngleMemo(self.amplitude)
