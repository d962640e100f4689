"""Rates from first principles: how far a weight is from where it will end, and how fast it should get there."""

from collections.abc import Callable
from typing import Any

from llm.errors import ConfigError
from llm.scaling.rates import Rate, Rates, Tensor, Update, check_knows

VECTOR_DISTANCE = 0.5
"""How far gains and biases are taken to be from where they will end (the paper's choice)."""


class Amos(Rates):
    """Derives each tensor's rate and decay from its initial size; `optimizer.lr` is α, the share of it moved in a step.

        lr(W) = α · σ / r,   λ(W) = α · r / (2 σ),   lr · λ = α² / 2

    σ is the standard deviation that the tensor started with (0.5 for gains and biases), r the RMS of the optimizer's
    step at lr = 1. The decay is what keeps the weights' size: steps of unit size and random direction would add α²σ² to
    their mean square in each update, and decay takes as much away. With `schedule=inverse_time` the rate falls as the
    paper has it, 1 / (1 + t/T).

    Assumes that a weight ends about as far from its start as it started from 0, that steps are about orthogonal to the
    weights, and that 1/α updates are many. α is 1e-3 for long runs and 1e-2 for runs of some hundred updates.

    Args:
        decay: whether weight decay is derived too; with False matrices get `optimizer.weight_decay`.

    Raises:
        ConfigError: an optimizer with steps as large as the gradient, or `decay` beside a weight decay of one's own.

    Source: Tian & Parikh, "Amos: An Adam-style Optimizer with Adaptive Weight Decay towards Model-Oriented Scale",
        arXiv:2210.11693, sections 3 and 4, with constant p; Su, kexue.fm/archives/9344, eqs. 6 to 12.
    Differs: the rates alone are taken, the steps are those of the chosen optimizer; gains are not decayed, their size
        at rest is 1 and not 0.
    """

    def __init__(self, *, decay: bool) -> None:
        self.decay = decay

    def check(self, optimizer: Callable[..., Any]) -> None:
        """Refuse SGD, and a decay that would be dropped."""
        check_knows("amos", optimizer)
        given = getattr(optimizer, "keywords", {}).get("weight_decay", 0.0)
        if self.decay and given:
            raise ConfigError(
                f"optimizer.weight_decay={given}: rates=amos derives it from lr and each tensor's size; set "
                "optimizer.weight_decay=0, or rates.decay=false"
            )

    def rate(self, tensor: Tensor, *, lr: float, weight_decay: float, d_model: int, update: Update) -> Rate:
        """Relate the tensor's initial size to the size of a step."""
        std = VECTOR_DISTANCE if tensor.kind == "vector" else tensor.std
        relative = std / update.rms(tensor._replace(std=std))
        if not self.decay:
            return Rate(lr * relative, weight_decay if tensor.kind == "matrix" else 0.0)
        return Rate(lr * relative, lr / (2 * std) * (std / relative) if tensor.kind != "vector" else 0.0)
