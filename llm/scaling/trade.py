"""The trade-off between updates and tokens: small batches need more updates to reach a loss, large ones more tokens.

    (S / S_min − 1) (E / E_min − 1) = 1,   S = S_min (1 + B_c / B) updates,   E = E_min (1 + B / B_c) tokens

At the critical batch B_c = E_min / S_min, updates and tokens are both twice their minimum. Reports call it the useful
batch, and the noise scale is an estimate of it.

Source: McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv:1812.06162, eq. 2.11.
"""

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

from llm.errors import ConfigError


class Trade(NamedTuple):
    """The hyperbola of one loss: the smallest number of updates that reaches it, and the smallest number of tokens."""

    min_updates: float
    min_tokens: float

    @property
    def critical_batch_tokens(self) -> float:
        """Tokens per update B_c at which updates and tokens are both twice their minimum."""
        return self.min_tokens / self.min_updates


def updates_over_minimum(*, batch_tokens: float, noise_scale: float) -> float:
    """Return S / S_min = 1 + B_c / B, the updates that this batch needs divided by the minimum."""
    return 1 + noise_scale / batch_tokens


def tokens_over_minimum(*, batch_tokens: float, noise_scale: float) -> float:
    """Return E / E_min = 1 + B / B_c, the tokens that this batch needs divided by the minimum."""
    return 1 + batch_tokens / noise_scale


def past_useful_batch(*, batch_tokens: float, noise_scale: float) -> str:
    """Return a sentence that compares a batch with the useful batch B_c."""
    updates = updates_over_minimum(batch_tokens=batch_tokens, noise_scale=noise_scale)
    tokens = tokens_over_minimum(batch_tokens=batch_tokens, noise_scale=noise_scale)
    ratio = batch_tokens / noise_scale
    side = "at it" if 0.95 < ratio < 1.05 else "past it" if ratio > 1 else "below it"
    return (
        f"{ratio:.2g} x the useful batch, {side}: {tokens:.3g} x the fewest tokens, {updates:.3g} x the fewest updates"
    )


def fit_trade(updates: Sequence[float], tokens: Sequence[float]) -> Trade:
    """Fit the hyperbola to runs that reached the same loss, by least squares on S_min / S + E_min / E = 1.

    Args:
        updates: number of updates S of each run, > 0.
        tokens: number of tokens E of each run, > 0.

    Raises:
        ConfigError: if there are fewer than two batch sizes, or the fitted S_min or E_min is not positive. The law need
            not hold for Adam or for sign updates.
    """
    if len({round(e / s, 9) for s, e in zip(updates, tokens, strict=True)}) < 2:
        raise ConfigError("batch_tokens: the trade of updates against tokens needs two batch sizes; sweep batch_tokens")
    columns = [[1 / value for value in values] for values in (updates, tokens)]
    lengths = [math.hypot(*column) for column in columns]  # normalize, since tokens exceed updates by thousands
    first, second = ([x / length for x in column] for column, length in zip(columns, lengths, strict=True))
    cosine, sums = math.fsum(map(operator.mul, first, second)), (math.fsum(first), math.fsum(second))
    least = [(sums[i] - cosine * sums[1 - i]) / (1 - cosine**2) / lengths[i] for i in (0, 1)]
    if min(least) <= 0:
        raise ConfigError(
            "batch_tokens: these runs lie on no hyperbola of updates against tokens; tune the lr at each batch, and "
            "take batches on both sides of the noise scale"
        )
    return Trade(*least)
