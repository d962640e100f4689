"""No position signal beyond the causal order."""

import math

from torch import Tensor

from llm.contracts import PositionView
from llm.model.position.log_n import LogNMode
from llm.model.position.position_module import Position


class NoPosition(Position):
    """No positions: queries and keys stay as they are, and only the causal mask carries order.

    Args:
        head_dim: size of a head; accepted because every position gets it, and not used.
        log_n: see `Position`.
        train_length: see `Position`.

    Source: Haviv et al., "Transformer Language Models without Positional Encodings Still Learn Positional
    Information", arXiv:2203.16634.
    """

    bare_keys_from = 0
    one_sided = "without causality nothing tells the order of tokens"

    def __init__(self, *, head_dim: int, log_n: LogNMode, train_length: int | None) -> None:
        super().__init__(log_n=log_n, train_length=train_length)
        self.head_dim = head_dim

    def reach(self, train_length: int) -> float:
        """Return infinity: no position is ever unseen."""
        return math.inf

    def views(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[PositionView, ...]:
        """Return one view: the vectors themselves."""
        return (PositionView(q=q, k=k, min_distance=0),)
