"""Balances in one update without a rate: each expert's threshold is a quantile of its scores over the update."""

import torch
from torch import Tensor

from llm.errors import ConfigError
from llm.model.ffn.balance.balance_rule import BiasBalance
from llm.model.ffn.balance.histogram import count_by_bin, upper_quantile
from llm.model.ffn.routing import Routing


class Quantile(BiasBalance):
    """A balancing rule that sets each expert's bias to the value that gives an even share on the last update's tokens.

        α_t = (k+1)-th largest over experts of s_tj + b_j
        β_j = value above which a share k / E of the x_tj = s_tj − α_t lies
        b ← decay · b − (1 − decay) · (β − mean β)

    This is one round of the dual of "give every token k experts and every expert T k / E tokens, at the highest total
    score". The quantile is read from a histogram of x over [-1, 1], which is summed over micro-batches and ranks. It is
    therefore the quantile over all tokens of the update, to within one bin. A mean of the quantiles of the parts would
    be another value wherever the parts hold different text. The update itself is routed with the old bias, so that no
    token's route depends on later tokens.

    Args:
        num_experts: E.
        top_k: k, below num_experts.
        decay: share of the old bias that is kept, in [0, 1); 0 balances in one update, and larger values smooth it.
        bins: number of bins of the histogram, at least 16. Ranks exchange 4 bytes per bin and expert per update.

    Raises:
        ConfigError: decay or bins out of range, or top_k = num_experts, where there is nothing to balance.

    Source: Su, "MoE tour, part 6: quantile balancing", kexue.fm/archives/11619, with the histogram of
    kexue.fm/archives/11848. Differs: interpolated within a bin, centred on zero, and decay.
    """

    def __init__(self, *, num_experts: int, top_k: int, decay: float, bins: int = 1000) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        if not 0 <= decay < 1:
            raise ConfigError(f"model.ffn.balance.decay={decay}: must lie in [0, 1); 0 balances in one update")
        if bins < 16:
            raise ConfigError(f"model.ffn.balance.bins={bins}: must be at least 16; try 1000")
        if top_k >= num_experts:
            raise ConfigError(
                f"model.ffn.top_k={top_k}: with all of model.ffn.num_experts={num_experts} chosen there is nothing to "
                "balance; use model/ffn/balance=none"
            )
        self.decay, self.bins = decay, bins

    @torch.no_grad()
    def statistics(self, routing: Routing) -> dict[str, Tensor]:
        scores = routing.logits.float().sigmoid()
        alpha = (scores + self.bias).topk(self.top_k + 1, dim=-1).values[:, -1:]
        return {"quantile_counts": count_by_bin(scores - alpha, low=-1.0, high=1.0, bins=self.bins)}

    @torch.no_grad()
    def after_optimizer_step(self, statistics: dict[str, Tensor]) -> None:
        beta = upper_quantile(statistics["quantile_counts"], self.top_k / self.num_experts, low=-1.0, high=1.0)
        self.bias.mul_(self.decay).sub_(((1 - self.decay) * (beta - beta.mean())).float())
