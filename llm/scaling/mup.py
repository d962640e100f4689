"""Learning rates that stay optimal when the width changes: maximal update parametrization."""

from typing import ClassVar

import torch
from torch import nn

from llm.scaling.rates import FINAL_NORM, Rate, RatedTensor, Update, WidthRates, initialized


class MuP(WidthRates):
    """Rates for a model m times as wide as the base, with which activations change per step as they do at the base.

        hidden matrices: lr · |ΔW at the base shape| / |ΔW at this shape|, spectral norms of a step at lr = 1;
            this is lr / m for AdamW and Lion, lr / √m for Tiger and for Muon matched to AdamW, lr for spectral Muon
        final norm: lr / m, with gains that start at 1/m
        embedding, head, other gains: lr

    With these gains of the final norm, neither the size of the head's scores nor that of their changes depends on the
    width. Weight decay is divided by the same factor that multiplies lr, so lr · λ, the share that decays per step, is
    constant. At the base width all rates equal those of `plain`.

    Its arguments and errors are those of `WidthRates`.

    Source: Yang et al., "Tensor Programs V", arXiv:2203.03466, table 8 (Adam; its output multiplier is
        part of the final norm's gain here, which also works with tied embeddings); Yang, Simon & Bernstein, "A Spectral
        Condition for Feature Learning", arXiv:2310.17813, for rules with other steps.
    Differs: attention scores keep 1/√head_dim, because the head size does not change with the width.
    """

    option: ClassVar = "mup"

    def prepare(self, model: nn.Module) -> None:
        """Divide the gain of the final norm by the relative width m."""
        scale_final_norm(model, self.base_d_model / initialized(model).d_model)

    def own_rate(self, tensor: RatedTensor, *, lr: float, weight_decay: float, d_model: int, update: Update) -> Rate:
        """Divide the rate by the growth of the spectral norm of a step relative to the base width."""
        m = d_model / self.base_d_model
        factor = 1.0
        if tensor.kind == "matrix":
            at_base = tensor._replace(rows=tensor.rows / m, columns=tensor.columns / m, std=tensor.std * m**0.5)  # type: ignore[arg-type]
            factor = update.spectral_norm(at_base) / update.spectral_norm(tensor)
        elif tensor.name.startswith(FINAL_NORM):
            factor = 1 / m
        return Rate(lr * factor, weight_decay / factor if tensor.kind == "matrix" else weight_decay)


@torch.no_grad()
def scale_final_norm(model: nn.Module, factor: float) -> None:
    """Multiply the gain and bias of the norm before the head by `factor`."""
    for name, parameter in model.named_parameters():
        if name.startswith(FINAL_NORM):
            parameter.mul_(factor)
