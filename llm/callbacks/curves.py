"""Draws loss, learning rate, gradient norm and throughput of a run."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from llm.run_folder.folder import RunFolder


class Curves(Callback):
    """A callback that draws curves.png from metrics.jsonl when training ends, also where a signal ends it.

    Args:
        run_folder: the folder of metrics.jsonl, in which curves.png is drawn.
    """

    def __init__(self, *, run_folder: RunFolder) -> None:
        self.run_folder = run_folder

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw after every line is written."""
        if trainer.is_global_zero:
            with self.run_folder.unless_full("curves.png"):
                draw_curves(self.run_folder.read_metrics(), self.run_folder.path / "curves.png")


def draw_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the lines of a metrics.jsonl; a panel whose metric was never recorded says so.

    Args:
        lines: one mapping of metric to value per step.
        path: path of the picture.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    names = sorted({name for line in lines for name in line})
    rates = [name for name in names if name.startswith("lr/")]
    loss, rate, norm, speed = panels.ravel()
    _panel(loss, lines, ["train/loss", "val/loss"], "loss (nats per token)")
    _panel(rate, lines, rates, "learning rate")
    _panel(norm, lines, ["grad_norm"], "gradient norm")
    _panel(speed, lines, ["tokens_per_second"], "throughput (tokens per second)")
    for axes in (norm, speed):
        axes.set_ylim(bottom=0)  # otherwise noise fills the panel
    speed.yaxis.set_major_formatter(EngFormatter())
    figure.savefig(path, dpi=110)


def _panel(axes: Axes, lines: list[dict[str, Any]], names: list[str], title: str) -> None:
    drawn = 0
    for name in names:
        points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
        if points:
            # the few points of a validation need marks to be visible
            axes.plot(
                *zip(*points, strict=True), label=name, linewidth=1.3, marker="o" if len(points) < 40 else None, ms=3
            )
            drawn += 1
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if drawn == 0:
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes, color="gray")
    elif drawn > 1 or title.startswith("learning"):
        axes.legend(frameon=False, fontsize=9)
