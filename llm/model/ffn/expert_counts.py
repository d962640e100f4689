"""Measures how evenly a router uses its experts."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.model.ffn.routing import Routing


def expert_counts(expert_ids: Int[Tensor, "tokens slots"], num_experts: int) -> Int[Tensor, " experts"]:
    """Return the number of tokens per expert; empty slots are not counted."""
    counts = expert_ids.new_zeros(num_experts + 1)
    ids = expert_ids.flatten()
    return counts.index_add_(0, ids, torch.ones_like(ids))[:num_experts]


def max_violation(counts: Tensor) -> Float[Tensor, ""]:
    """Return the largest load over the mean load, minus one: 0 at perfect balance.

    Source: Wang et al., arXiv:2408.15664, eq. 4.
    """
    counts = counts.float()
    return counts.max() / counts.mean().clamp_min(torch.finfo(torch.float32).tiny) - 1


def load_metrics(routing: Routing, num_experts: int) -> dict[str, Tensor]:
    """Return metrics of the routing of one micro-batch, and its counts as a statistic.

    expert_load: share of the slots per expert. max_violation: see there. dead_experts: experts without a token.
    top_expert_share: the largest load. router_entropy: mean entropy of a token's scores in nats. experts_per_token.
    """
    counts = expert_counts(routing.expert_ids, num_experts)
    load = counts.float() / counts.sum().clamp_min(1)
    p = routing.probabilities
    return {
        "stat/expert_counts": counts,
        "expert_load": load,
        "max_violation": max_violation(counts),
        "dead_experts": (counts == 0).float().sum(),
        "top_expert_share": load.max(),
        "router_entropy": torch.special.entr(p).sum(-1).mean(),
        "experts_per_token": counts.sum().float() / p.shape[0],
    }
