"""Rates that carry over from one width to another: maximal update parametrization."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llm.scaling.rates import FINAL_NORM, Rate, Rates, Tensor, Update, check_base_width, check_knows


class MuP(Rates):
    """Lowers the rates of a model m times as wide as the base, so that activations move as they did at the base.

        hidden matrices: lr · |ΔW at the base shape| / |ΔW at this shape|, spectral norms of a step at lr = 1:
            lr / m for AdamW and Lion, lr / √m for Tiger and for Muon matched to AdamW, lr for spectral Muon
        final norm: starts at 1/m, lr / m: the head's scores stay of one size, and their changes
        embedding, head, other gains: lr

    Weight decay is multiplied by what lr is divided by: lr · λ, the share that decays in a step, stays. At the base
    width nothing changes.

    Args:
        base_d_model: width at which lr was tuned, at least 1. Head size and depth are taken to be the same there.

    Raises:
        ConfigError: a base width below 1, or an optimizer whose steps are as large as the gradient.

    Source: Yang et al., "Tensor Programs V", arXiv:2203.03466, table 8 (Adam; its output multiplier stands in the
        final norm's gain, which serves tied embeddings too); Yang, Simon & Bernstein, "A Spectral Condition for
        Feature Learning", arXiv:2310.17813, for rules with other steps.
    Differs: attention scores keep 1/√head_dim, since heads keep their size when a model is made wider.
    """

    def __init__(self, *, base_d_model: int) -> None:
        check_base_width("mup", base_d_model)
        self.base_d_model = base_d_model

    def check(self, optimizer: Callable[..., Any]) -> None:
        """Refuse SGD."""
        check_knows("mup", optimizer)

    def prepare(self, model: nn.Module) -> None:
        """Let the final norm scale down by the width."""
        scale_final_norm(model, self.base_d_model / getattr(model, "d_model"))  # noqa: B009

    def rate(self, tensor: Tensor, *, lr: float, weight_decay: float, d_model: int, update: Update) -> Rate:
        """Divide by how much wider the model is, as the kind of step asks for."""
        m = d_model / self.base_d_model
        factor = 1.0
        if tensor.kind == "matrix":
            at_base = tensor._replace(rows=tensor.rows / m, columns=tensor.columns / m, std=tensor.std * m**0.5)  # type: ignore[arg-type]
            factor = update.spectral_norm(at_base) / update.spectral_norm(tensor)
        elif tensor.name.startswith(FINAL_NORM):
            factor = 1 / m
        return Rate(lr * factor, weight_decay / factor if tensor.kind == "matrix" else 0.0)


@torch.no_grad()
def scale_final_norm(model: nn.Module, factor: float) -> None:
    """Multiply the gain (and shift) of the norm before the head."""
    for name, parameter in model.named_parameters():
        if name.startswith(FINAL_NORM):
            parameter.mul_(factor)
