"""Defines the result of routing, and the order in which experts process it."""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Routing(NamedTuple):
    """The experts of each token, and their weights."""

    expert_ids: Int[Tensor, "tokens slots"]
    """`num_experts` marks an empty slot."""
    gate_weights: Float[Tensor, "tokens slots"]
    """Factors of the experts' outputs, 0 in an empty slot. The router's gradient flows through them."""
    logits: Float[Tensor, "tokens experts"]
    probabilities: Float[Tensor, "tokens experts"]
    """Scores of a token, divided by their sum."""


class Router(nn.Module):
    """The base class of routers, which are called as `(tokens, selection_bias) -> Routing`."""

    selection: ClassVar[str]
    """How experts are chosen, `top_k` or `threshold`; each balancing rule supports one of them."""
    has_empty_slots: ClassVar[bool]
    """Whether a token may have empty slots."""
    proj: nn.Linear
    """Projection of a token to the logits of its experts."""
    borrowed_parameters: ClassVar = ("proj.weight",)
    """Parameters that forward reads for a product in fp32 without calling `proj`; see `ParameterBorrower`."""


class ExpertOrder(NamedTuple):
    """The slots of all tokens sorted by expert: the rows of expert e are offsets[e-1] ... offsets[e] - 1."""

    token_ids: Int[Tensor, " rows"]
    """The token of each row."""
    slot_ids: Int[Tensor, " rows"]
    """The index of each row in the flattened [tokens, slots]."""
    offsets: Int[Tensor, " experts"]
    """End of each expert's rows, in int32; empty slots follow the last."""

    def rows(self) -> Int[Tensor, " rows"]:
        """Return the row of each slot, which is the inverse of slot_ids."""
        places = torch.arange(self.slot_ids.numel(), device=self.slot_ids.device)
        return torch.empty_like(self.slot_ids).scatter_(0, self.slot_ids, places)


def sort_by_expert(expert_ids: Int[Tensor, "tokens slots"], num_experts: int) -> ExpertOrder:
    """Sort slots by expert, and those of an expert by token, without dropping any or synchronizing with a GPU."""
    sorted_ids, slot_ids = expert_ids.flatten().sort(stable=True)
    experts = torch.arange(num_experts, device=expert_ids.device)
    offsets = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
    return ExpertOrder(token_ids=slot_ids // expert_ids.shape[1], slot_ids=slot_ids, offsets=offsets)
