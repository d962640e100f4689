"""Balances in one update without a rate: each expert's threshold is a quantile of its scores."""

import torch
from torch import Tensor

from llm.errors import ConfigError
from llm.model.ffn.balance.balance_rule import BiasBalance
from llm.model.ffn.routing import Routing


class Quantile(BiasBalance):
    """A balancing rule that sets each expert's bias to the value that gives an even share on the last update's tokens.

        α_t = (k+1)-th largest over experts of s_tj + b_j
        β_j = (T k / E + 1)-th largest over tokens of s_tj − α_t,   b ← decay · b − (1 − decay) · β

    This is one round of the dual of "give every token k experts and every expert T k / E tokens, at the highest total
    score". The β of micro-batches and ranks are averaged. The update itself is routed with the old bias, so that no
    token's route depends on later tokens.

    Args:
        num_experts: E.
        top_k: k, below num_experts.
        decay: share of the old bias that is kept, in [0, 1); 0 balances in one update, and larger values smooth it.

    Raises:
        ConfigError: decay lies outside [0, 1), or top_k = num_experts, where there is nothing to balance.

    Source: Su, "MoE tour, part 6: quantile balancing", kexue.fm/archives/11619. Differs: centred on zero, and decay.
    """

    def __init__(self, *, num_experts: int, top_k: int, decay: float) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        if not 0 <= decay < 1:
            raise ConfigError(f"model.ffn.balance.decay={decay}: must lie in [0, 1); 0 balances in one update")
        if top_k >= num_experts:
            raise ConfigError(
                f"model.ffn.top_k={top_k}: with all of model.ffn.num_experts={num_experts} chosen there is nothing to "
                "balance; use model/ffn/balance=none"
            )
        self.decay = decay

    @torch.no_grad()
    def statistics(self, routing: Routing) -> dict[str, Tensor]:
        scores = routing.logits.sigmoid()
        alpha = (scores + self.bias).topk(self.top_k + 1, dim=-1).values[:, -1:]
        share = scores.shape[0] * self.top_k // self.num_experts
        beta = (scores - alpha).topk(min(share + 1, scores.shape[0]), dim=0).values[-1]
        return {"quantile": beta, "num_micro_batches": beta.new_ones(())}

    @torch.no_grad()
    def after_optimizer_step(self, statistics: dict[str, Tensor]) -> None:
        beta = statistics["quantile"] / statistics["num_micro_batches"]
        self.bias.mul_(self.decay).sub_((1 - self.decay) * (beta - beta.mean()))
