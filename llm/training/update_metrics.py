"""Collects what the micro-batches of one update report, and reduces it over micro-batches and ranks."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from llm.contracts import StatisticsReceiver

STATISTIC = "stat/"
"""Part of the name of a metric that is not logged.

Such a metric is summed over the micro-batches and ranks of an update, and handed back to the layer that returned it
through `after_optimizer_step`. Examples are expert counts and codebook sums.
"""

PEAK = "peak/"
"""Part of the name of a metric of which an update keeps the largest value over its micro-batches and ranks.

It must be known before the optimizer's step, which it may change (`llm.optim.qk_clip`).
"""

Reduction = Literal["sum", "mean", "max"]

Reduce = Callable[[Tensor, Reduction], Tensor]
"""Combines a tensor over the ranks."""


class UpdateMetrics:
    """Metrics and statistics of the current update.

    Args:
        reduce: combines a tensor over the ranks.
    """

    def __init__(self, reduce: Reduce) -> None:
        self._reduce = reduce
        self._pending: dict[str, list[Tensor]] = {}
        self._statistics: dict[str, Tensor] = {}
        self._peaks: dict[str, Tensor] = {}

    def collect(self, values: Mapping[str, Tensor]) -> None:
        """Add what one micro-batch reports."""
        for name, value in values.items():
            if STATISTIC in name:
                held = self._statistics.get(name)
                self._statistics[name] = value.detach().clone() if held is None else held.add_(value.detach())
            elif PEAK in name:
                held = self._peaks.get(name)
                self._peaks[name] = value.detach().clone() if held is None else torch.maximum(held, value.detach())
            else:
                self._pending.setdefault(name, []).append(value.detach())

    def close(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this rank's loss per micro-batch, and the mean of every metric over micro-batches and ranks."""
        losses = torch.stack(self._pending["train/loss"])
        means = {name: torch.stack(values).mean(0) for name, values in self._pending.items()}
        self._pending.clear()
        return losses, reduced_together(means, self._reduce, "mean")

    def take_peaks(self) -> dict[str, Tensor]:
        """Return the largest values over micro-batches and ranks by name, and start the next update's."""
        peaks, self._peaks = self._peaks, {}
        return reduced_together(peaks, self._reduce, "max")

    def take_statistics(self) -> dict[str, Tensor]:
        """Return the sums over all ranks by name, and start the next update's."""
        statistics, self._statistics = self._statistics, {}
        return reduced_together(statistics, self._reduce, "sum")

    def statistics_of_layer(self, index: int, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one layer's statistics by their own names."""
        prefix = f"train/layer{index}/{STATISTIC}"
        return {n.removeprefix(prefix): v for n, v in statistics.items() if n.startswith(prefix)}


def reduced_together(values: Mapping[str, Tensor], reduce: Reduce, how: Reduction) -> dict[str, Tensor]:
    """Combine tensors over the ranks in one exchange per dtype, each element as if it were alone."""
    combined: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(value.dtype for value in values.values()):
        own = {name: value for name, value in values.items() if value.dtype == dtype}
        flat = reduce(torch.cat([value.reshape(-1) for value in own.values()]), how)
        parts = flat.split([value.numel() for value in own.values()])
        combined |= {name: part.view(value.shape) for (name, value), part in zip(own.items(), parts, strict=True)}
    return {name: combined[name] for name in values}


def hand_statistics(layer: nn.Module, statistics: dict[str, Tensor], *, only_finite: bool) -> None:
    """Hand one layer's statistics of an update to the modules that returned them.

    Args:
        layer: a block of the decoder.
        statistics: sums over micro-batches and ranks, by name; empty where the layer returned none.
        only_finite: whether to discard statistics that are not finite, which would leave no average finite again.
    """
    if only_finite and not all(bool(value.isfinite().all()) for value in statistics.values()):
        return
    for piece in layer.modules() if statistics else ():
        if isinstance(piece, StatisticsReceiver):
            piece.after_optimizer_step(statistics)
