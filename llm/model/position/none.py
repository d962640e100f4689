"""No position signal beyond the causal order."""

import math

from torch import Tensor

from llm.contracts import PositionView
from llm.model.position.base import Position
from llm.model.position.log_n import LogNMode


class NoPosition(Position):
    """Leaves queries and keys as they are; the causal mask alone tells order.

    Args:
        head_dim: size of a head; unused, any is right.
        log_n: see `Position`.
        train_length: see `Position`.

    Source: Haviv et al., "Transformer Language Models without Positional Encodings Still Learn Positional
    Information", arXiv:2203.16634.
    """

    bare_keys_from = 0

    def __init__(self, *, head_dim: int, log_n: LogNMode, train_length: int | None) -> None:
        super().__init__(log_n=log_n, train_length=train_length)
        self.head_dim = head_dim

    def reach(self, train_length: int) -> float:
        """No limit: no position is ever new."""
        return math.inf

    def views(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[PositionView, ...]:
        """One view: the vectors themselves."""
        return (PositionView(q=q, k=k, min_distance=0),)
