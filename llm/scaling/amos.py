"""Learning rates and weight decay from the initial size of each tensor, which estimates how far its weights move."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm.errors import ConfigError
from llm.scaling.derivation import rule_of_factory
from llm.scaling.rates import Rate, RatedTensor, Rates, Update, check_knows

VECTOR_DISTANCE = 0.5
"""Assumed distance between the initial and the final value of gains and biases, as in the paper."""


class Amos(Rates):
    """Rates and decay derived from each tensor's initial size, of which `optimizer.lr`, α, is the share moved per step.

        lr(W) = α · σ / r,   λ(W) = α · r / (2 σ),   lr · λ = α² / 2

    σ is the standard deviation of the tensor at initialization (0.5 for gains and biases, 1/√d_in for a tensor that
    starts at 0), and r is the RMS of the optimizer's step at lr = 1. Decay keeps the weights' size: steps of unit size
    and random direction add α²σ² to their mean square per update, and decay removes as much. With
    `schedule=inverse_time` the rate falls as in the paper, 1 / (1 + t/T).

    Assumes that a weight moves in total about as far as its initial distance from 0, that steps are about orthogonal
    to the weights, and that 1/α is large. Set α to 1e-3 for long runs and to 1e-2 for a few hundred updates.

    Args:
        decay: whether weight decay is derived too; with False it is `optimizer.weight_decay`.
        lr_scales: see `Rates`.
        decay_kinds: see `Rates`; by default all but vectors with `decay`, and matrices without.

    Raises:
        ConfigError: if the steps of the optimizer are as large as the gradient, or `decay` and `optimizer.weight_decay`
            are both set.

    Source: Tian & Parikh, "Amos: An Adam-style Optimizer with Adaptive Weight Decay towards Model-Oriented Scale",
        arXiv:2210.11693, sections 3 and 4, with constant p; Su, kexue.fm/archives/9344, eqs. 6 to 12.
    Differs: only the rates are taken, and the steps are those of the chosen optimizer; gains do not decay, because
        their size at rest is 1 and not 0.
    """

    def __init__(
        self,
        *,
        decay: bool,
        lr_scales: Mapping[str, float] | None = None,
        decay_kinds: Sequence[str] | None = None,
    ) -> None:
        self.decay, self.decayed = decay, ("matrix", "embedding", "head") if decay else ("matrix",)
        super().__init__(lr_scales=lr_scales, decay_kinds=decay_kinds)

    def check(self, optimizer: Callable[..., Any]) -> None:
        """Raise ConfigError for SGD, or for a weight decay that `decay` would replace."""
        check_knows("amos", optimizer)
        given = rule_of_factory(optimizer)[1].get("weight_decay", 0.0)
        if self.decay and given:
            raise ConfigError(
                f"optimizer.weight_decay={given}: rates=amos derives it from lr and each tensor's size; set "
                "optimizer.weight_decay=0, or rates.decay=false"
            )

    def own_rate(self, tensor: RatedTensor, *, lr: float, weight_decay: float, d_model: int, update: Update) -> Rate:
        """Return the rate and decay from the tensor's initial size and the size of a step."""
        std = VECTOR_DISTANCE if tensor.kind == "vector" else tensor.std or tensor.columns**-0.5
        rms = update.rms(tensor._replace(std=std))
        return Rate(lr * std / rms, lr * rms / (2 * std) if self.decay else weight_decay)
