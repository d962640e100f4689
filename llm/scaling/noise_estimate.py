"""Estimates the gradient noise scale from the squared norms of gradients of two batch sizes."""

import math

from llm.errors import ConfigError


def two_batch_estimate(small_square: float, big_square: float, *, small: float, big: float) -> tuple[float, float]:
    """Return unbiased estimates of |g|² and tr Σ from the squared norms of gradients of two batch sizes.

        |g|² = (B |G_B|² − b |G_b|²) / (B − b),   tr Σ = (|G_b|² − |G_B|²) / (1/b − 1/B)

    These follow from E|G_B|² = |g|² + tr Σ / B. Either estimate may be negative, so average them before dividing.

    Args:
        small_square: |G_b|², the mean over all small batches.
        big_square: |G_B|², the squared norm of the mean gradient of all small batches together.
        small: size b of a small batch, in the unit of the noise scale (tokens).
        big: size B of all small batches together, larger than b.

    Raises:
        ConfigError: if B <= b, because the noise cannot be estimated from a single batch.

    Source: McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv:1812.06162, eqs. A.2 and A.3.
    """
    if not 0 < small < big:
        raise ConfigError(
            f"micro_batch_size: the noise scale compares gradients of {small:g} tokens with those of {big:g}; take at "
            "least two micro-batches per update, by a smaller micro_batch_size or two devices"
        )
    signal = (big * big_square - small * small_square) / (big - small)
    trace = (small_square - big_square) / (1 / small - 1 / big)
    return signal, trace


class SmoothedNoiseScale:
    """An estimate of the noise scale from separate averages over updates: B_noise = ⟨tr Σ⟩ / ⟨|g|²⟩.

    An average of single ratios would have an unbounded bias, because |g|² is small and its estimate may be negative.

    Args:
        decay: decay rate of both exponential averages, in [0, 1); 0.99 averages over about a hundred measurements.

    Raises:
        ConfigError: if the decay rate is out of range.

    Source: McCandlish et al., arXiv:1812.06162, appendix A.1.
    """

    def __init__(self, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"callbacks.noise_scale.decay={decay}: must lie in [0, 1); try 0.99")
        self.decay = decay
        self.averages: dict[str, list[float]] = {}

    def update(self, name: str, *, signal: float, trace: float) -> None:
        """Add one measurement to the averages of `name`; discard one that is not finite, which would stay in them."""
        if not math.isfinite(signal + trace):
            return
        held = self.averages.setdefault(name, [0.0, 0.0])
        for i, value in enumerate((signal, trace)):  # both start at 0; the bias correction cancels in the ratio
            held[i] = self.decay * held[i] + (1 - self.decay) * value

    def value(self, name: str) -> float | None:
        """Return B_noise, or None unless both averages are positive, which needs enough measurements of low noise."""
        signal, trace = self.averages.get(name, (0.0, 0.0))
        return trace / signal if signal > 0 and trace > 0 else None


PROBE_REMEDY = "set a number of tokens, such as noise_scale in the summary of a run with callbacks=noise_scale"
