"""Reports the load of experts per update, warns of idle experts, and draws the load over the run."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from llm.callbacks.rows import log_rows
from llm.contracts import ExpertCounter
from llm.errors import ConfigError
from llm.run_folder.folder import RunFolder

log = logging.getLogger(__name__)

LOAD = "expert_load_global"
MOST_TIMES = 200
"""Columns of the plot; the updates of longer runs are averaged."""
MOST_ROWS_TIMES = 50
"""Steps in the table that loggers receive."""


class ExpertLoad(Callback):
    """A callback that reports the load of experts over the whole update, which includes all its micro-batches and
    ranks.

    It adds two metrics to the line of an update. `train/layer<i>/expert_load_global` is each expert's share of the
    tokens' slots, and `train/layer<i>/max_violation_global` is the largest load over the mean, minus one. The metrics
    without `_global` are means over micro-batches. It warns once when an expert has received no token for `alarm_after`
    updates. It draws expert_load.png when training ends. It does nothing for a model without experts.

    Args:
        run_folder: the folder of metrics.jsonl, in which expert_load.png is drawn.
        alarm_after: number of updates without a token after which an expert is reported as idle, at least 1.

    Raises:
        ConfigError: an alarm_after below 1.
    """

    def __init__(self, *, run_folder: RunFolder, alarm_after: int) -> None:
        if alarm_after < 1:
            raise ConfigError(f"callbacks.expert_load.alarm_after={alarm_after}: must be at least 1 update; try 100")
        self.run_folder, self.alarm_after = run_folder, alarm_after
        self._idle: dict[int, Tensor] = {}
        self._layers: list[tuple[int, ExpertCounter]] = []
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start counting at the update from which the run starts or resumes."""
        self._step = trainer.global_step
        self._layers = expert_layers(pl_module)
        self._idle = {index: torch.zeros_like(layer.update_counts) for index, layer in self._layers}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Count the consecutive updates in which each expert received no token."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        for index, layer in self._layers:
            self._idle[index].add_(1).mul_(layer.update_counts == 0)
        if self._step % self.alarm_after == 0 and trainer.is_global_zero:  # reading them synchronizes with the GPU
            self._warn()

    def _warn(self) -> None:
        for index, idle in self._idle.items():
            # an expert exceeds the limit once between two checks
            experts = ((idle >= self.alarm_after) & (idle < 2 * self.alarm_after)).nonzero().flatten().tolist()
            if experts:
                log.warning(
                    "step %d: layer %d: experts %s received no token in %d updates; try model/ffn/balance=loss_free, "
                    "or a larger rate",
                    *(self._step, index, ", ".join(map(str, experts)), self.alarm_after),
                )

    def step_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Tensor]:
        """Return the figures of the update for the recorder."""
        metrics = {}
        for index, layer in self._layers:
            load = layer.update_counts / layer.update_counts.sum().clamp_min(1)
            metrics[f"train/layer{index}/{LOAD}"] = load
            metrics[f"train/layer{index}/max_violation_global"] = load.max() * load.numel() - 1
        return metrics

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw the plot after every line is written."""
        if self._idle and trainer.is_global_zero:
            lines = self.run_folder.read_metrics()
            with self.run_folder.unless_full("expert_load.png"):
                draw_expert_load(lines, self.run_folder.path / "expert_load.png")
            log_rows(trainer, pl_module, "expert_load", ("step", "layer", "expert", "load"), load_rows(lines))


def load_rows(lines: list[dict[str, Any]]) -> list[list[Any]]:
    """Return (step, layer, expert, load over an even share) at up to MOST_ROWS_TIMES steps, including the last one."""
    told = [line for line in lines if any(name.endswith(LOAD) for name in line)]
    stride = -(-len(told) // MOST_ROWS_TIMES) or 1
    return [
        [line["step"], int(name.split("/")[1].removeprefix("layer")), expert, share * len(load)]
        for line in told[::-1][::stride][::-1]
        for name, load in line.items()
        if name.endswith(LOAD) and isinstance(load, list)
        for expert, share in enumerate(load)
    ]


def expert_layers(pl_module: Any) -> list[tuple[int, ExpertCounter]]:
    """Return (layer, its feed-forward) for the layers that count the tokens of experts; a frozen layer counts none."""
    trained = [
        (index, layer.ffn)
        for index, layer in enumerate(pl_module.model.layers)
        if any(parameter.requires_grad for parameter in layer.parameters())
    ]
    return [(index, piece) for index, piece in trained if isinstance(piece, ExpertCounter)]


def draw_expert_load(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw one panel per layer with experts over time; colour is the load, where 1 is an even share.

    Args:
        lines: one mapping of metric to value per step, as in metrics.jsonl.
        path: path of the picture, which is not drawn where no line has a load.
    """
    names = sorted({n for line in lines for n in line if n.endswith(LOAD)}, key=lambda n: int(n.split("/")[1][5:]))
    if not names:
        return
    figure = Figure(figsize=(11, 0.6 + 1.7 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), list)]
        loads = torch.tensor([load for _, load in points]).t()
        loads = torch.nn.functional.adaptive_avg_pool1d(loads, min(MOST_TIMES, loads.shape[1])) * loads.shape[0]
        extent = (points[0][0] - 0.5, points[-1][0] + 0.5, -0.5, loads.shape[0] - 0.5)
        image = axes.imshow(
            loads, aspect="auto", origin="lower", extent=extent, cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest"
        )
        axes.set_title(name.split("/")[1], loc="left", fontsize=11)
        axes.set_ylabel("expert")
    panels[-1].set_xlabel("step")
    figure.colorbar(image, ax=list(panels), label="load over an even share")  # pyright: ignore[reportPossiblyUnboundVariable]
    figure.savefig(path, dpi=110)
