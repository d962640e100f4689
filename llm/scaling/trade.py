"""What a batch size costs: more updates below the noise scale, more tokens above it.

    (S / S_min − 1) (E / E_min − 1) = 1,   S = S_min (1 + B_c / B) updates,   E = E_min (1 + B / B_c) tokens

for one loss to reach; B_c = E_min / S_min is the batch at which both are twice their least, and the noise scale
estimates it. Source: McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv:1812.06162, eq. 2.11.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from llm.errors import ConfigError


class Trade(NamedTuple):
    """The hyperbola of one loss: the fewest updates that any batch needs, and the fewest tokens."""

    min_updates: float
    min_tokens: float

    @property
    def critical_batch_tokens(self) -> float:
        """B_c: tokens per update at which updates and tokens are both twice their least."""
        return self.min_tokens / self.min_updates


def updates_over_minimum(*, batch_tokens: float, noise_scale: float) -> float:
    """S / S_min = 1 + B_c / B: how many times the fewest updates this batch takes."""
    return 1 + noise_scale / batch_tokens


def tokens_over_minimum(*, batch_tokens: float, noise_scale: float) -> float:
    """E / E_min = 1 + B / B_c: how many times the fewest tokens this batch takes."""
    return 1 + batch_tokens / noise_scale


def past_useful_batch(*, batch_tokens: float, noise_scale: float) -> str:
    """Say in words where a batch lies on the hyperbola."""
    updates = updates_over_minimum(batch_tokens=batch_tokens, noise_scale=noise_scale)
    tokens = tokens_over_minimum(batch_tokens=batch_tokens, noise_scale=noise_scale)
    ratio = batch_tokens / noise_scale
    side = "past the useful batch" if ratio > 1 else "below the useful batch"
    return (
        f"{ratio:.2g} x the noise scale, {side}: {tokens:.2g} x the fewest tokens, {updates:.2g} x the fewest updates"
    )


def fit_trade(updates: Sequence[float], tokens: Sequence[float]) -> Trade:
    """Fit the hyperbola to runs that reached one loss, by least squares in S_min / S + E_min / E = 1.

    Args:
        updates: S of each run, > 0.
        tokens: E of each run, > 0.

    Raises:
        ConfigError: fewer than two different batches, or runs that no such hyperbola passes near: a Trade must
            have positive parts. With signs or Adam it need not hold at all.
    """
    inverse = torch.tensor([[1 / s, 1 / e] for s, e in zip(updates, tokens, strict=True)], dtype=torch.float64)
    if len({round(e / s, 9) for s, e in zip(updates, tokens, strict=True)}) < 2:
        raise ConfigError("batch_tokens: the trade of updates against tokens needs two batch sizes; sweep batch_tokens")
    lengths = inverse.norm(dim=0)  # columns of one size: tokens outnumber updates by thousands
    solution = torch.linalg.lstsq(inverse / lengths, torch.ones(len(inverse), 1, dtype=torch.float64)).solution[:, 0]
    min_updates, min_tokens = (solution / lengths).tolist()
    if min_updates <= 0 or min_tokens <= 0:
        raise ConfigError(
            "batch_tokens: these runs lie on no hyperbola of updates against tokens; tune the lr at each batch, and "
            "take batches on both sides of the noise scale"
        )
    return Trade(min_updates, min_tokens)
