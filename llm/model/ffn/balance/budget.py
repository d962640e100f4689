"""Balance of a router that decides how many experts a token gets: even loads and a fixed average."""

import math
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from llm.errors import ConfigError
from llm.model.ffn.balance.base import BiasBalance, check_rate


class Budget(BiasBalance):
    """Moves each expert's threshold until it is chosen by a share top_k / E of the tokens.

        b ← b − rate · sign(F − k/E),   F_i = share of the update's tokens that chose expert i

    This keeps both the experts even and the average number a token at k. It starts where k experts a token are
    expected of logits from N(0, 1): b = −σ(Φ⁻¹(1 − k/E)).

    Args:
        num_experts: E.
        top_k: k, experts a token on average, below num_experts.
        rate: move of the bias in an update, > 0.

    Raises:
        ConfigError: a rate that is not above 0, or top_k = num_experts.

    Source: Su, kexue.fm/archives/10815, in the one-line form of kexue.fm/archives/11626, eq. 9.
    """

    selections: ClassVar[tuple[str, ...]] = ("threshold",)

    def __init__(self, *, num_experts: int, top_k: int, rate: float) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        check_rate("rate", rate)
        if top_k >= num_experts:
            raise ConfigError(
                f"model.ffn.top_k={top_k}: must be below model.ffn.num_experts={num_experts} for a router that decides "
                f"how many experts a token gets; try {max(num_experts // 4, 1)}"
            )
        self.rate = rate
        self.bias.fill_(-1 / (1 + math.exp(-NormalDist().inv_cdf(1 - top_k / num_experts))))

    @torch.no_grad()
    def after_optimizer_step(self, statistics: dict[str, Tensor]) -> None:
        share = statistics["expert_counts"].double() / statistics["num_tokens"]
        self.bias.sub_(self.rate * (share - self.top_k / self.num_experts).sign().float())
