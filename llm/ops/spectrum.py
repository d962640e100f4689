"""Measures how many directions a matrix uses, from its singular values."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Spectrum(NamedTuple):
    """Measures of singular values σ_1 ≥ … ≥ σ_n of a matrix; all have the largest value where all σ are equal."""

    effective_rank: float
    """exp H(p) with p_i = σ_i / Σσ: n where all are equal, 1 at rank one (Roy and Vetterli, EUSIPCO 2007)."""
    stable_rank: float
    """Σσ² / σ_1², which small singular values hardly change (Rudelson and Vershynin, arXiv:math/0503442)."""
    entropy: float
    """H(q) / ln n with q_i = σ_i² / Σσ², in [0, 1] (Liu et al., "Muon is Scalable", arXiv:2502.16982, section 3.4)."""
    effective_share: float
    """effective_rank / n, which compares matrices of different shapes."""


def spectrum(values: Float[Tensor, " n"]) -> Spectrum:
    """Return the measures of singular values; those of a matrix of zeros are 0."""
    values = values.double()
    largest, count = float(values.max()), len(values)
    if largest == 0.0:
        return Spectrum(0.0, 0.0, 0.0, 0.0)
    scaled = values / largest
    shares, squares = scaled / scaled.sum(), scaled.square() / scaled.square().sum()
    effective = math.exp(float(torch.special.entr(shares).sum()))
    entropy = float(torch.special.entr(squares).sum()) / math.log(count) if count > 1 else 1.0
    return Spectrum(effective, float(scaled.square().sum()), entropy, effective / count)


def mean_spectrum(matrix: Tensor) -> Spectrum:
    """Return the measures of a matrix, or their means over a stack of matrices [count, rows, columns]."""
    stack = matrix if matrix.ndim == 3 else matrix[None]
    each = [spectrum(values) for values in torch.linalg.svdvals(stack.double())]
    return Spectrum(*(sum(measure) / len(each) for measure in zip(*each, strict=True)))
