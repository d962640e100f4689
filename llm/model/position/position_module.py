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

    turns_values: bool = False
    """Whether values are turned by their positions, and outputs back by theirs."""

    def __init__(self, *, log_n: LogNMode, train_length: int | None) -> None:
        super().__init__()
        self.log_n = LogN(mode=log_n, train_length=train_length)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Position":
        super()._apply(fn, recurse)
        # frequencies move with the weights, but no cast of the model rounds them
        self.frequencies = self.frequencies.to(fn(self.frequencies).device)
        return self

    is_for_evaluation: bool = False
    """Whether models are trained with another position and only read with this one."""

    one_sided: str = "its far view is defined for keys before the query"
    """The reason why keys after the query cannot be scored; empty where distance alone matters in both directions."""

    def why_one_sided(self) -> str:
        """Return the reason why this position serves only causal attention, empty where it serves every sight."""
        if self.scales_queries:
            return f"log_n={self.log_n.mode} scales a query by the number of keys before it"
        return self.one_sided

    @property
    def scales_queries(self) -> bool:
        """Whether queries are also scaled by their position."""
        return self.log_n.mode != "none"

    def reach(self, train_length: int) -> float:
        """Return how many tokens of context a model trained on windows of train_length can use at this position."""
        return train_length

    def cautions(self, *, context_length: int, window: int | None, is_training: bool) -> list[str]:
        """Return one line per setting that cannot act as its name says.

        Args:
            context_length: tokens per window of the run.
            window: keys that a query of the attention sees, or None for all.
            is_training: whether the model is trained, not only read.
        """
        mode, train_length, lines = self.log_n.mode, self.log_n.train_length, []
        if mode == "full" and window is not None and window < context_length:
            lines.append(
                f"model.position.log_n=full: scales query i for i + 1 visible keys, but model.attention.window="
                f"{window} hides all keys before; use model.position.log_n=none for these layers"
            )
        if is_training and mode == "clipped" and train_length is not None and train_length >= context_length:
            lines.append(
                "model.position.log_n=clipped: scales no query within the training length; train with log_n=none or "
                "full, and set clipped for evaluation"
            )
        elif is_training and train_length not in (None, context_length):
            lines.append(
                f"model.position.train_length={train_length}: differs from context_length={context_length}, at which "
                f"this run trains; set model.position.train_length={context_length}"
            )
        return lines

    def forward(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time kv_heads head_dim"],
        positions: Int[Tensor, "batch time"],
    ) -> tuple[PositionView, ...]:
        """Return the views, in ascending order of the distance from which they apply."""
        return self.views(self.log_n(q, positions), k, positions)

    def turn(self, x: Tensor, positions: Int[Tensor, "batch time"]) -> Tensor:
        """Turn values by their positions, as keys are turned; the same values where a position turns none."""
        return x

    def turn_back(self, x: Tensor, positions: Int[Tensor, "batch time"]) -> Tensor:
        """Undo `turn` at the positions of the outputs."""
        return x

    @abstractmethod
    def views(
        self,
        q: Float[Tensor, "batch time heads head_dim"],
        k: Float[Tensor, "batch time kv_heads head_dim"],
        positions: Int[Tensor, "batch time"],
    ) -> tuple[PositionView, ...]:
        """Return the views of queries that are already scaled."""
