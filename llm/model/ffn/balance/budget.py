"""Balances a router that decides the number of experts per token: even loads and a fixed average."""

import math
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llm.errors import ConfigError
from llm.model.ffn.balance.balance_rule import BiasBalance, check_rate
from llm.model.ffn.balance.histogram import count_by_bin, upper_quantile
from llm.model.ffn.routing import Routing

BINS = 1000
"""Bins of the histogram of `quantile`; 10000 gain nothing measurable."""


class Budget(BiasBalance):
    """A balancing rule that moves each expert's threshold until a share top_k / E of the tokens chooses it.

        sign:      b ← b − rate · sign(F − k/E),   F_i = share of the update's tokens that chose expert i
        quantile:  b_i = −(value above which a share k / E of the update's scores of expert i lies)

    `quantile` balances in one update without a rate; the value is read from a histogram over [0, 1], as in `Quantile`.
    Either rule keeps the loads even and the average number per token at k. The bias starts where logits from N(0, 1)
    give k experts per token: b = −σ(Φ⁻¹(1 − k/E)).

    Args:
        num_experts: E.
        top_k: k, experts per token on average, below num_experts.
        rate: change of the bias per update under `sign`, > 0.
        rule: `sign` or `quantile`.

    Raises:
        ConfigError: the rate is not above 0, or top_k = num_experts.

    Source: Su, kexue.fm/archives/10815, in the one-line form of kexue.fm/archives/11626, eq. 9; the quantile of the
    same post, from a histogram (kexue.fm/archives/11848).
    """

    selections: ClassVar[tuple[str, ...]] = ("threshold",)

    def __init__(
        self, *, num_experts: int, top_k: int, rate: float, rule: Literal["sign", "quantile"] = "sign"
    ) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        check_rate("rate", rate)
        if top_k >= num_experts:
            raise ConfigError(
                f"model.ffn.top_k={top_k}: must be below model.ffn.num_experts={num_experts} for a router that decides "
                f"the number of experts per token; try {max(num_experts // 4, 1)}"
            )
        self.rate, self.rule = rate, rule
        self.bias.fill_(-1 / (1 + math.exp(-NormalDist().inv_cdf(1 - top_k / num_experts))))

    @torch.no_grad()
    def statistics(self, routing: Routing) -> dict[str, Tensor]:
        if self.rule == "sign":
            return {}
        return {"score_counts": count_by_bin(routing.logits.float().sigmoid(), low=0.0, high=1.0, bins=BINS)}

    @torch.no_grad()
    def after_optimizer_step(self, statistics: dict[str, Tensor]) -> None:
        if self.rule == "quantile":
            share = self.top_k / self.num_experts
            self.bias.copy_(-upper_quantile(statistics["score_counts"], share, low=0.0, high=1.0))
            return
        share = statistics["expert_counts"].double() / statistics["num_tokens"]
        self.bias.sub_(self.rate * (share - self.top_k / self.num_experts).sign().float())
