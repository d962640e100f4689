"""Balances a router that decides the number of experts per token: even loads and a fixed average."""

import math
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from llm.errors import ConfigError
from llm.model.ffn.balance.balance_rule import BiasBalance, check_rate


class Budget(BiasBalance):
    """A balancing rule that moves each expert's threshold until a share top_k / E of the tokens chooses it.

        b ← b − rate · sign(F − k/E),   F_i = share of the update's tokens that chose expert i

    This keeps the loads even and the average number per token at k. It starts where logits from N(0, 1) give k experts
    per token: b = −σ(Φ⁻¹(1 − k/E)).

    Args:
        num_experts: E.
        top_k: k, experts per token on average, below num_experts.
        rate: change of the bias per update, > 0.

    Raises:
        ConfigError: the rate is not above 0, or top_k = num_experts.

    Source: Su, kexue.fm/archives/10815, in the one-line form of kexue.fm/archives/11626, eq. 9.
    """

    selections: ClassVar[tuple[str, ...]] = ("threshold",)

    def __init__(self, *, num_experts: int, top_k: int, rate: float) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        check_rate("rate", rate)
        if top_k >= num_experts:
            raise ConfigError(
                f"model.ffn.top_k={top_k}: must be below model.ffn.num_experts={num_experts} for a router that decides "
                f"the number of experts per token; try {max(num_experts // 4, 1)}"
            )
        self.rate = rate
        self.bias.fill_(-1 / (1 + math.exp(-NormalDist().inv_cdf(1 - top_k / num_experts))))

    @torch.no_grad()
    def after_optimizer_step(self, statistics: dict[str, Tensor]) -> None:
        share = statistics["expert_counts"].double() / statistics["num_tokens"]
        self.bias.sub_(self.rate * (share - self.top_k / self.num_experts).sign().float())
