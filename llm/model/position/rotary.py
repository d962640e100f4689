"""The arithmetic that every rotary position shares: frequencies, angles, and the rotation itself."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from llm.errors import ConfigError


def inverse_frequencies(*, head_dim: int, base: float) -> Float[Tensor, " half"]:
    """Return θ_m = base^(−2m/head_dim), m = 0 … head_dim/2 − 1, in fp64 so that long positions keep their phase.

    Raises:
        ConfigError: an odd head_dim, or a base that is not above 1.

    Source: Su et al., "RoFormer", arXiv:2104.09864, section 3.2.2.
    """
    if head_dim % 2:
        raise ConfigError(f"model.head_dim={head_dim}: rotary positions turn pairs; use an even head_dim")
    if base <= 1:
        raise ConfigError(f"model.position.base={base}: must be above 1; 10000 is usual")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return base**-exponents


def cos_sin(
    positions: Shaped[Tensor, "batch time"], frequencies: Float[Tensor, " half"]
) -> tuple[Float[Tensor, "batch time half"], Float[Tensor, "batch time half"]]:
    """Return cos and sin of position · frequency in fp32; positions may be real numbers."""
    angles = positions[..., None].to(torch.float32) * frequencies.to(positions.device, torch.float32)
    return angles.cos(), angles.sin()


class AngleMemo:
    """Computes an angle table once for all layers of a forward: the answer for the last positions tensor is kept."""

    def __init__(self) -> None:
        self._key: Tensor | None = None
        self._version = -1
        self._value: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, positions: Shaped[Tensor, "batch time"], frequencies: Float[Tensor, " half"]
    ) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():  # the compiler merges equal expressions itself
            return cos_sin(positions, frequencies)
        version = positions._version if not positions.is_inference() else 0
        if self._value is None or self._key is not positions or self._version != version:
            self._key, self._version, self._value = positions, version, cos_sin(positions, frequencies)
        return self._value

    def __deepcopy__(self, _memo: dict) -> "AngleMemo":
        return AngleMemo()
