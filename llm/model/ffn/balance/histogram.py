"""Counts scores in bins, so that a quantile over an update is exact to a bin however its tokens are split."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

TOKENS_PER_SLAB = 4096
"""Tokens whose bin indices exist at once: 16 KiB of indices per expert."""


def count_by_bin(
    values: Float[Tensor, "tokens experts"], *, low: float, high: float, bins: int
) -> Int[Tensor, "experts bins"]:
    """Return how many values of each expert lie in each of `bins` equal parts of [low, high].

    Values outside count in the first or the last part. Counts are int32, so that sums over micro-batches and ranks are
    exact, in any order, below 2^31 tokens per update.
    """
    num_experts = values.shape[1]
    counts = torch.zeros(num_experts * bins, dtype=torch.int32, device=values.device)
    first_bin = bins * torch.arange(num_experts, dtype=torch.int32, device=values.device)
    for slab in values.split(TOKENS_PER_SLAB):
        index = ((slab - low) * (bins / (high - low))).int().clamp_(0, bins - 1).add_(first_bin).flatten()
        counts.index_add_(0, index, torch.ones_like(index))
    return counts.view(num_experts, bins)


def upper_quantile(
    counts: Int[Tensor, "experts bins"], share: float, *, low: float, high: float
) -> Float[Tensor, " experts"]:
    """Return the value above which a share of each expert's counted values lies, in fp64.

        n_j = Σ_m c_jm,   a_jm = Σ_{m' ≥ m} c_jm',   m* = max {m : a_jm ≥ share · n_j}
        β_j = low + (m* + 1 − (share · n_j − a_j,m*+1) / c_j,m*) · (high − low) / bins

    The fraction interpolates within the bin, as if its values were spread evenly.

    Args:
        counts: counts of `count_by_bin`, summed over any number of parts; every expert has at least one.
        share: wanted share of values above the result, in (0, 1).
        low: lower end of the first bin.
        high: upper end of the last bin.
    """
    bins = counts.shape[1]
    above = counts.double().flip(1).cumsum(1).flip(1)  # a_jm
    wanted = share * above[:, :1]
    at = ((above >= wanted).sum(1, keepdim=True) - 1).clamp_min(0)  # above falls with m
    inside = counts.gather(1, at).double()
    beyond = above.gather(1, at) - inside
    edge = at + 1 - (wanted - beyond) / inside.clamp_min(1)
    return low + edge[:, 0] * ((high - low) / bins)
