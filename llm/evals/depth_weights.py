"""Evaluates which earlier blocks each sublayer reads."""

from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from llm.errors import ConfigError
from llm.evals.evaluation import Result, Subject, check_batches, watch_modules
from llm.model.depth_attention import DepthQuery, DepthRead


class DepthWeights:
    """An evaluation of the mean weight of every source of every sublayer under model.residual=attention.

    Args:
        batches: number of validation batches, or None for all.

    Raises:
        ConfigError: batches is below 1, or the model adds its sublayers by a plain sum.
    """

    def __init__(self, *, batches: int | None) -> None:
        self.batches = check_batches("residual", batches)

    def __call__(self, subject: Subject) -> Result:
        """Average the weights of the subject."""
        queries = {name: m for name, m in subject.model.named_modules() if isinstance(m, DepthQuery)}
        if not queries:
            raise ConfigError(
                "eval=residual: the model adds its sublayers by a plain sum; remove it from eval, or evaluate a run of "
                "model.residual=attention"
            )
        found: dict[str, list[Tensor]] = {}

        def see(name: str, read: DepthRead) -> None:
            found.setdefault(name, []).append(read.weights.double().mean((0, 1)).cpu())

        watch_modules(subject, queries, see, batches=self.batches)
        sums = {name: torch.stack(found[name]).mean(0) for name in queries}
        widest = max(len(weights) for weights in sums.values())
        header = ["sublayer", "embedding", *(f"block {index}" for index in range(1, widest))]
        rows = [[_label(name), *(f"{weight:.3f}" for weight in weights.tolist())] for name, weights in sums.items()]
        rows = [row + [""] * (len(header) - len(row)) for row in rows]
        last = torch.stack([weights[-1] for weights in sums.values() if len(weights) > 1])
        return Result(
            headline={
                "weight of the embedding": float(torch.stack([weights[0] for weights in sums.values()]).mean()),
                "weight of the latest block": float(last.mean()),
            },
            figures=[{"sublayer": _label(name), "weights": weights.tolist()} for name, weights in sums.items()],
            header=header,
            rows=rows,
            draw=lambda axes: _draw(axes, sums, widest),
        )


def _label(name: str) -> str:
    """Return `layer 3 ffn` for `layers.3.ffn_query`, and `head` for the query of the final norm."""
    parts = name.split(".")
    return f"layer {parts[1]} {parts[2].removesuffix('_query')}" if parts[0] == "layers" else "head"


def _draw(axes: Axes, sums: dict[str, Tensor], widest: int) -> None:
    table: Any = torch.full((len(sums), widest), float("nan"))
    for row, weights in enumerate(sums.values()):
        table[row, : len(weights)] = weights
    image = axes.imshow(table.numpy(), aspect="auto", vmin=0)
    axes.set_yticks(range(len(sums)), [_label(name) for name in sums])
    axes.set_xlabel("source: 0 is the embedding")
    axes.figure.colorbar(image, ax=axes)
