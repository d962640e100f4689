"""Defines the auxiliary load-balancing loss."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llm.model.ffn.balance.balance_rule import Balance, check_rate
from llm.model.ffn.routing import Routing

Scope = Literal["sequence", "micro_batch", "global_batch"]


class AuxLoss(Balance):
    """A balancing rule that adds a loss, whose gradient moves the router away from experts that are used too often.

        L = weight · E · Σ_i f_i P_i,   f_i = share of the slots that went to expert i,   P_i = mean over tokens of p_i

    p are a token's scores, divided by their sum. The gradient flows through P alone. It is weight · E times that of
    ½‖f − 1/E‖² with ∂P in place of ∂f. L is `weight` where all f are equal, and can be smaller where they are not,
    so read the balance from max_violation.

    Args:
        num_experts: E.
        top_k: experts per token.
        weight: weight of the loss, > 0. Published are 1e-2 (Switch Transformers) and 1e-4 beside a selection bias
            (DeepSeek-V3); of 1e-3, 1e-2 and 1e-1, docs/moe.md measured the lowest loss with 1e-3.
        scope: the tokens of f: each `sequence` (P too), the `micro_batch`, or the `global_batch`, of which Qiu et al.
            report that it lets experts specialise. The global f is that of the last update, exact over its
            micro-batches and ranks, since the present one is unknown before the last forward pass. The first update
            uses the micro-batch.

    Raises:
        ConfigError: the weight is not above 0.

    Source: Fedus et al., "Switch Transformers", arXiv:2101.03961, eq. 4-6; by sequence, DeepSeek-V3,
    arXiv:2412.19437, eq. 17-20; over the global batch, Qiu et al., arXiv:2501.11873, eq. 4.
    Differs: f is divided by top_k as well, so that balance gives 1 for any top_k; the global f lags by one update.
    """

    load: Tensor

    def __init__(self, *, num_experts: int, top_k: int, weight: float, scope: Scope) -> None:
        super().__init__(num_experts=num_experts, top_k=top_k)
        check_rate("weight", weight)
        self.weight, self.scope = weight, scope
        if scope == "global_batch":
            self.register_buffer("load", torch.zeros(num_experts))

    def losses(self, routing: Routing, *, num_sequences: int) -> dict[str, Tensor]:
        groups = num_sequences if self.scope == "sequence" else 1
        load = slot_shares(routing, groups)
        if self.scope == "global_batch":
            load = torch.where(self.load.sum() > 0, self.load.to(load), load)
        probabilities = routing.probabilities.view(groups, -1, self.num_experts).mean(1)
        loss = self.num_experts * (load * probabilities).sum(-1).mean()
        return {"load_balance_loss": self.weight * loss}

    def after_optimizer_step(self, statistics: dict[str, Tensor]) -> None:
        if self.scope == "global_batch":
            counts = statistics["expert_counts"]
            self.load.copy_(counts / counts.sum())


def slot_shares(routing: Routing, groups: int) -> Float[Tensor, "groups experts"]:
    """Return the share of slots per expert, in each of `groups` equal ranges of tokens."""
    ids = routing.expert_ids.view(groups, -1)
    counts = routing.probabilities.new_zeros(groups, routing.probabilities.shape[1])
    return counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype)) / ids.shape[1]
