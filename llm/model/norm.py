"""Norms over the last axis: RMSNorm and LayerNorm."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llm.ops.functional import rms_norm


class RMSNorm(nn.Module):
    """A norm to unit root-mean-square with a learned gain: y = g · x / sqrt(mean(x²) + eps).

    Args:
        dim: length of the last axis.
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
    """A norm to mean 0 and variance 1 with a learned gain and an optional bias: y = g · (x − μ)/σ + b.

    Args:
        dim: length of the last axis.
        eps: added to the variance.
        bias: whether b is learned; else there is none.

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
