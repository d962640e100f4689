"""Defines the base class of every position, with the facts that attentions compare with their needs."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm.contracts import PositionView
from llm.model.position.log_n import LogN, LogNMode


class Position(nn.Module, ABC):
    """A module that turns queries and keys into views of the scores; see `llm.contracts.PositionView`.

    Args:
        log_n: scale of the queries that grows with the log of the keys they see; see `llm.model.position.log_n.LogN`.
        train_length: tokens per window when the model was trained, or null where log_n is none.
    """

    far_from: int | None = None
    """The distance from which a second view applies; None where one view covers all distances."""

    bare_keys_from: int | None = None
    """The distance from which scores use keys without rotation: 0 for all distances, None for no distance."""

    frequencies: Tensor = torch.empty(0, dtype=torch.float64)
    """Radians per token of each pair, in fp64; empty for a position that rotates nothing."""

    amplitude: float = 1.0
    """Factor on rotated queries and on rotated keys, which multiplies scores by its square."""

    def __init__(self, *, log_n: LogNMode, train_length: int | None) -> None:
        super().__init__()
        self.log_n = LogN(mode=log_n, train_length=train_length)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Position":
        super()._apply(fn, recurse)
        # frequencies move with the weights, but no cast of the model rounds them
        self.frequencies = self.frequencies.to(fn(self.frequencies).device)
        return self

    @property
    def scales_queries(self) -> bool:
        """Whether queries are also scaled by their position."""
        return self.log_n.mode != "none"

    def reach(self, train_length: int) -> float:
        """Return how many tokens of context a model trained on windows of train_length can use at this position."""
        return train_length

    def forward(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time kv_heads head_dim"],
        positions: Int[Tensor, "batch time"],
    ) -> tuple[PositionView, ...]:
        """Return the views, in ascending order of the distance from which they apply."""
        return self.views(self.log_n(q, positions), k, positions)

    @abstractmethod
    def views(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time kv_heads head_dim"],
        positions: Int[Tensor, "batch time"],
    ) -> tuple[PositionView, ...]:
        """Return the views of queries that are already scaled."""
