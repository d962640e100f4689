"""Models and noise with which bounds are enumerated."""

import itertools
import math
from typing import Any

import torch

from llm.contracts import CAUSAL
from llm.model.attention.kernels.reference import visible_keys
from llm.model.transformer import TransformerOutput
from llm.ops.loss import reference_linear_cross_entropy

TABLE_VOCABULARY = 4
TABLE_BOS = 3


class Table:
    """A decoder of arbitrary, inconsistent conditionals: scores depend on a place and on the tokens that it sees."""

    vocab_size = TABLE_VOCABULARY

    def scores(self, place: int, seen: frozenset[tuple[int, int]]) -> torch.Tensor:
        """Return the scores of the token at a place, given (place, token) of the visible ones."""
        seed = hash((place, tuple(sorted(seen)))) % (1 << 31)
        return torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def nll(self, place: int, seen: frozenset[tuple[int, int]], token: int) -> float:
        """Return −log p of a token."""
        return -float(self.scores(place, seen).log_softmax(-1)[token])

    def __call__(self, input_ids, *, positions, document_ids, sight=CAUSAL) -> TransformerOutput:
        batch, time = input_ids.shape
        sizes = {"time": time, "time_k": time, "window": None, "device": input_ids.device}
        visible = visible_keys(**sizes, document_ids=document_ids, positions=positions, sight=sight)
        length = time // 2 if sight.kind == "block_pair" else time
        hidden = torch.zeros(batch, time, self.vocab_size, dtype=torch.float64)
        for row, place in itertools.product(range(batch), range(length)):
            seen = frozenset(
                (j % length, int(input_ids[row, j]))
                for j in range(time)
                if visible[row, place, j] and input_ids[row, j] < self.vocab_size and j != place
            )
            hidden[row, place] = self.scores(place, seen)
        return TransformerOutput(hidden, {}, {})

    def loss(self, hidden, labels, *, reduction="mean", weights=None):
        """Return the cross-entropy of the scores themselves."""
        identity = torch.eye(self.vocab_size, dtype=torch.float64)
        return reference_linear_cross_entropy(hidden, identity, labels, reduction=reduction, weights=weights)

    def logits(self, hidden):
        """Return the scores themselves."""
        return hidden


class GivenNoise:
    """Noise with given levels and a given order of the uniform numbers."""

    def __init__(self, levels: torch.Tensor, uniform: torch.Tensor) -> None:
        self.rows = torch.arange(len(levels))
        self._levels, self._uniform = levels, uniform

    def uniform(self, columns: int, *, stream: int) -> Any:
        """Return the given numbers."""
        return self._uniform

    def levels(self, per_row: int = 1) -> Any:
        """Return the given levels."""
        return self._levels.expand(-1, per_row)

    def normal(self, *shape: int) -> Any:
        """Return zeros."""
        return torch.zeros(len(self.rows), *shape)


def enumerated(num_scored: int, time: int, places: list[int]) -> GivenNoise:
    """Return noise with every count of masked tokens and every order of the given places, one per row."""
    levels, uniform = [], []
    for count in range(1, num_scored + 1):
        for order in itertools.permutations(range(len(places))):
            row = torch.full((time,), 0.99, dtype=torch.float64)
            row[places] = (torch.tensor(order, dtype=torch.float64) + 1) / 100
            uniform.append(row)
            levels.append((count - 0.5) / num_scored)
    return GivenNoise(torch.tensor(levels, dtype=torch.float64)[:, None], torch.stack(uniform))


def window(tokens: list[int], *, documents: list[int] | None = None, rows: int = 1) -> dict[str, torch.Tensor]:
    """Return a batch of equal rows; each document starts at the given places."""
    ids = torch.tensor([tokens]).expand(rows, -1)
    starts = torch.zeros_like(ids, dtype=torch.bool)
    starts[:, documents or [0]] = True
    places = torch.arange(len(tokens)).expand(rows, -1)
    labels = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], 1)
    positions = places - places.masked_fill(~starts, 0).cummax(1).values
    return {"input_ids": ids, "labels": labels, "positions": positions, "document_ids": starts.long().cumsum(1)}


def any_order_nll(table: Table, tokens: list[int], scored: list[int], *, clean: list[int]) -> float:
    """Return the mean over all orders of the negative log-likelihood of the scored tokens, given the clean ones."""
    total = 0.0
    for order in itertools.permutations(scored):
        for count, place in enumerate(order):
            seen = frozenset((j, tokens[j]) for j in [*clean, *order[:count]])
            total += table.nll(place, seen, tokens[place])
    return total / math.factorial(len(scored))
