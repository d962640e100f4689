"""Defines the result of routing, and the order in which experts process it."""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight."""

    expert_ids: Int[Tensor, "tokens slots"]
    """`num_experts` marks a slot that is left empty."""
    gate_weights: Float[Tensor, "tokens slots"]
    """What an expert's output is multiplied by; 0 in an empty slot. The router's gradient comes through here."""
    logits: Float[Tensor, "tokens experts"]
    probabilities: Float[Tensor, "tokens experts"]
    """Scores of a token over their sum."""


class Router(nn.Module):
    """What routers have in common; called as `(tokens, selection_bias) -> Routing`."""

    selection: ClassVar[str]
    """How experts are chosen, `top_k` or `threshold`: balancing rules are made for one of them."""
    has_empty_slots: ClassVar[bool]
    """Whether a token may leave slots empty."""
    proj: nn.Linear
    """From a token to the logits of its experts."""
    borrowed_parameters: ClassVar = ("proj.weight",)
    """Read for a product in fp32, without a call of `proj`; see `ParameterBorrower`."""


class ExpertOrder(NamedTuple):
    """The slots of all tokens sorted by expert: the rows of expert e are offsets[e-1] ... offsets[e] - 1."""

    token_ids: Int[Tensor, " rows"]
    """The token of a row."""
    slot_ids: Int[Tensor, " rows"]
    """The place of a row among the flattened [tokens, slots]."""
    offsets: Int[Tensor, " experts"]
    """End of each expert's rows, in int32; empty slots stand behind the last."""

    def rows(self) -> Int[Tensor, " rows"]:
        """Where each slot went: the inverse of slot_ids."""
        places = torch.arange(self.slot_ids.numel(), device=self.slot_ids.device)
        return torch.empty_like(self.slot_ids).scatter_(0, self.slot_ids, places)


def sort_by_expert(expert_ids: Int[Tensor, "tokens slots"], num_experts: int) -> ExpertOrder:
    """Sort slots by expert, tokens of an expert in their order; no token is dropped and nothing waits for a GPU."""
    sorted_ids, slot_ids = expert_ids.flatten().sort(stable=True)
    experts = torch.arange(num_experts, device=expert_ids.device)
    offsets = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
    return ExpertOrder(token_ids=slot_ids // expert_ids.shape[1], slot_ids=slot_ids, offsets=offsets)
