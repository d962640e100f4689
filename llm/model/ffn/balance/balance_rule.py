"""Defines the base class of balancing rules, which balances nothing."""

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
    `after_optimizer_step` changes state once per update, from `statistics` that are summed over the update's
    micro-batches and ranks. Forward passes never change state, so that recomputed ones count once.

    Args:
        num_experts: number of experts to choose from.
        top_k: experts per token, on average.
    """

    selections: ClassVar[tuple[str, ...]] = ("top_k",)
    """The ways of choosing experts that the rule supports."""

    def __init__(self, *, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k

    def selection_bias(self) -> Float[Tensor, " experts"] | None:
        """Return the bias of the scores by which experts are chosen; None for no bias."""
        return None

    def losses(self, routing: Routing, *, num_sequences: int) -> dict[str, Tensor]:
        """Return weighted scalars that are added to the objective."""
        return {}

    def statistics(self, routing: Routing) -> dict[str, Tensor]:
        """Return sums over tokens that `after_optimizer_step` needs in addition to `expert_counts` and `num_tokens`."""
        return {}

    def after_optimizer_step(self, statistics: dict[str, Tensor]) -> None:
        """Change the rule's state, from the sums over all micro-batches and ranks of the update."""


class BiasBalance(Balance):
    """A rule with a selection bias: an fp32 buffer that no cast of the model changes and that checkpoints contain."""

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
