"""Defines the base class of balancing rules, which by itself balances nothing."""

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm.errors import ConfigError
from llm.model.ffn.routing import Routing

TRAINING_STATISTICS = (".ffn.balance.load",)
"""Ends of the names of buffers that only training reads: exports and comparisons of weights exclude them."""


def without_statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a decoder's state without the statistics that only training reads."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(TRAINING_STATISTICS)}


class Balance(nn.Module):
    """A balancing rule that changes nothing, and the base class of all others.

    Rules act in three places: `selection_bias` shifts the choice of experts, `losses` adds to the objective, and
    `after_optimizer_step` moves state once an update, from `statistics` that were summed over the update's
    micro-batches and ranks. Forward passes never change state, so that recomputed ones count once.

    Args:
        num_experts: experts to choose from.
        top_k: experts a token, on average.
    """

    selections: ClassVar[tuple[str, ...]] = ("top_k",)
    """The ways of choosing experts that the rule is made for."""

    def __init__(self, *, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k

    def selection_bias(self) -> Float[Tensor, " experts"] | None:
        """What is added to the scores that experts are chosen by; None for nothing."""
        return None

    def losses(self, routing: Routing, *, num_sequences: int) -> dict[str, Tensor]:
        """Weighted scalars added to the objective."""
        return {}

    def statistics(self, routing: Routing) -> dict[str, Tensor]:
        """Sums over tokens that `after_optimizer_step` needs beside `expert_counts` and `num_tokens`."""
        return {}

    def after_optimizer_step(self, statistics: dict[str, Tensor]) -> None:
        """Move the rule's state, given the sums over all micro-batches and ranks of the update."""


class BiasBalance(Balance):
    """A rule that holds a selection bias: an fp32 buffer that no cast of the model touches and checkpoints keep."""

    bias: Tensor

    def __init__(self, *, num_experts: int, top_k: int) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BiasBalance":
        exact = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:  # in bf16 a step of 1e-3 would be lost
            self.bias = exact.to(self.bias.device)
        return self

    def selection_bias(self) -> Float[Tensor, " experts"]:
        return self.bias


def check_rate(key: str, value: float) -> None:
    """Raise ConfigError for a rate that is not a positive finite number."""
    if not 0 < value < math.inf:
        raise ConfigError(f"model.ffn.balance.{key}={value}: must be above 0 and finite; try 1e-3")
