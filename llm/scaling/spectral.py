"""Learning rates and initial sizes from the shape of each matrix: the spectral condition."""

from typing import ClassVar

import torch
from torch import nn

from llm.scaling.mup import scale_final_norm
from llm.scaling.rates import FINAL_NORM, Rate, RatedTensor, Update, WidthRates, initialized


class Spectral(WidthRates):
    """Rates with which weights and steps have spectral norm √(d_out / d_in), relative to a square matrix of the base.

        std = √(min(1, d_out/d_in) / d_in)
        lr(W) = lr · [√(d_out/d_in) / |ΔW|] / [1 / |ΔW of base_d_model x base_d_model|],  |ΔW| of a step at lr = 1

    Between widths the rates change as in `mup`. Within one model they also differ between tall and wide matrices.
    Embedding, head and norms have the rates of `mup`. The product lr · λ is the same for all matrices.

    Its arguments and errors are those of `WidthRates`.

    Source: Yang, Simon & Bernstein, "A Spectral Condition for Feature Learning", arXiv:2310.17813, condition 1 and
        section 5; Su, kexue.fm/archives/10795.
    Differs: the initial depth factor of residual outputs is kept.
    """

    option: ClassVar = "spectral"

    @torch.no_grad()
    def prepare(self, model: nn.Module) -> None:
        """Scale matrices with fewer rows than columns by √(d_out/d_in); divide the final norm by the relative width."""
        stds = initialized(model).initial_stds
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "token_embedding" not in name and "lm_head" not in name:
                factor = min(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
                parameter.mul_(factor)
                stds[name] *= factor
        scale_final_norm(model, self.base_d_model / initialized(model).d_model)

    def own_rate(self, tensor: RatedTensor, *, lr: float, weight_decay: float, d_model: int, update: Update) -> Rate:
        """Compare the tensor's shape with a square of the base width."""
        factor = 1.0
        if tensor.kind == "matrix":
            base = self.base_d_model
            narrowing = min(1.0, tensor.rows / tensor.columns) ** 0.5
            std_of_square = tensor.std / narrowing * (tensor.columns / base) ** 0.5
            square = tensor._replace(rows=base, columns=base, std=std_of_square)
            wanted = (tensor.rows / tensor.columns) ** 0.5
            factor = wanted * update.spectral_norm(square) / update.spectral_norm(tensor)
        elif tensor.name.startswith(FINAL_NORM):
            factor = self.base_d_model / d_model
        return Rate(lr * factor, weight_decay / factor if tensor.kind == "matrix" else weight_decay)
