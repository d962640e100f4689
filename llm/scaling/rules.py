"""Rules that carry a tuned learning rate from one batch size to another: lr_scale = f(batch_tokens), 1 at the base."""

import math

from llm.errors import ConfigError


def none(batch_tokens: int, *, base_batch_tokens: int) -> float:
    """Return 1: the learning rate is used as it stands, whatever the batch."""
    _ratio(batch_tokens, base_batch_tokens)
    return 1.0


def linear(batch_tokens: int, *, base_batch_tokens: int) -> float:
    """Return B/B₀, which keeps the drift of SGD per token.

    Assumes plain SGD, a learning rate small against the curvature, and B far below the noise scale.

    Args:
        batch_tokens: tokens per update, B.
        base_batch_tokens: tokens per update at which the learning rate was tuned, B₀.

    Source: Goyal et al., "Accurate, Large Minibatch SGD", arXiv:1706.02677, section 2.1; limits in McCandlish et
    al., arXiv:1812.06162, eq. 2.6.
    """
    return _ratio(batch_tokens, base_batch_tokens)


def sqrt(batch_tokens: int, *, base_batch_tokens: int) -> float:
    """Return √(B/B₀), which keeps the noise that Adam or RMSprop adds per token.

    Assumes that gradient noise dominates the signal. The full rule scales 1 − β in proportion to B as well, which
    this factor leaves alone.

    Args:
        batch_tokens: tokens per update, B.
        base_batch_tokens: tokens per update at which the learning rate was tuned, B₀.

    Source: Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", arXiv:2205.10287,
    definition 5.3.
    """
    return math.sqrt(_ratio(batch_tokens, base_batch_tokens))


def _ratio(batch_tokens: int, base_batch_tokens: int) -> float:
    if base_batch_tokens < 1:
        raise ConfigError(
            f"scaling.base_batch_tokens={base_batch_tokens}: must be at least 1; set the tokens per update at which "
            "optimizer.lr was tuned"
        )
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens}: must be at least 1; try {base_batch_tokens}")
    return batch_tokens / base_batch_tokens
