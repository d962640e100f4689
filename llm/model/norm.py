"""Normalisation over the last axis: RMSNorm and LayerNorm."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llm.ops.functional import rms_norm


class RMSNorm(nn.Module):
    """Scales each vector to unit root-mean-square, then by a learned gain: y = g · x / sqrt(mean(x²) + eps).

    Args:
        dim: length of the normalised axis.
        eps: added to the mean square.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467, eq. 4.
    """

    parameter_kinds: ClassVar = {"weight": "vector"}

    def __init__(self, *, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Centres and scales each vector, then applies a learned gain and, if asked, a bias: y = g · (x − μ)/σ + b.

    Args:
        dim: length of the normalised axis.
        eps: added to the variance.
        bias: whether b is learned.

    Source: Ba et al., "Layer Normalization", arXiv:1607.06450, eq. 4.
    """

    parameter_kinds: ClassVar = {"weight": "vector", "bias": "vector"}

    def __init__(self, *, dim: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)
