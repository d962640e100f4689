"""Searches a grid of learning rates for the lowest loss, with training runs that are kept and not repeated."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir

from llm.config.check import check
from llm.config.files import to_plain
from llm.errors import NonFiniteError
from llm.training.train import train

CONF = Path(__file__).resolve().parents[1] / "conf"
ORIGIN = 1e-3
"""The rate at index 0; neighbours are a factor of 2 apart."""
STEPS_EACH_WAY = 10
"""Largest distance of a search from its start, in points of the grid: a factor of 1000."""

Curve = dict[int, float]
"""Loss by index of the rate."""


def rate_of(index: float) -> float:
    """Return the learning rate of a point of the grid, or between points."""
    return ORIGIN * 2.0**index


def index_of(rate: float) -> float:
    """Return where a learning rate lies on the grid."""
    return math.log2(rate / ORIGIN)


def composed(overrides: list[str]) -> dict[str, Any]:
    """Return the plain configuration of a command line."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_plain(compose("train", ["name=experiment", *overrides]))


def run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train once, or read the finished run of an earlier call; return the summary."""
    path = folder / "summary.json"
    if not is_done(path):
        cfg = composed(overrides)
        check(cfg)
        shutil.rmtree(folder, ignore_errors=True)  # an unfinished run of an interrupted call
        folder.mkdir(parents=True)
        with contextlib.suppress(NonFiniteError):
            train(cfg, folder)
        _drop_checkpoints(folder)
    return json.loads(path.read_text())


def is_done(path: Path) -> bool:
    """Return whether a run has ended, also if it ended because its loss was not finite."""
    status = json.loads(path.read_text())["status"] if path.exists() else ""
    return status == "finished" or "not finite" in status


def _drop_checkpoints(folder: Path) -> None:
    for file in (folder / "checkpoints").rglob("*"):
        if file.is_file() or file.is_symlink():
            file.unlink()


def loss_of(summary: dict[str, Any]) -> float:
    """Return the validation loss, infinite where the run diverged."""
    loss = summary.get("val/loss")
    finished = summary["status"] == "finished"
    return loss if finished and isinstance(loss, float) and math.isfinite(loss) else math.inf


def walk(start: int, measure: Callable[[int], float]) -> Curve:
    """Measure from `start` downhill until the lowest loss has a higher one on both sides; return all losses."""
    losses = {start: measure(start)}
    for _ in range(2 * STEPS_EACH_WAY):
        best = lowest(losses)
        missing = [index for index in (best + 1, best - 1) if index not in losses]
        if not missing:
            break
        losses[missing[0]] = measure(missing[0])
    return dict(sorted(losses.items()))


def lowest(losses: Curve) -> int:
    """Return the index of the lowest loss."""
    return min(losses, key=lambda index: losses[index])


def vertex(losses: Curve) -> tuple[float, float]:
    """Return index and loss at the lowest point of the parabola through the lowest loss and its two neighbours."""
    best = lowest(losses)
    left, middle, right = (losses.get(best + shift, math.inf) for shift in (-1, 0, 1))
    if not (math.isfinite(left) and math.isfinite(right)):
        return float(best), middle
    curvature = left - 2 * middle + right
    shift = 0.5 * (left - right) / curvature if curvature > 0 else 0.0
    return best + shift, middle - 0.25 * (left - right) * shift


def loss_at(losses: Curve, index: float) -> tuple[float, bool]:
    """Return the loss at a rate between those measured, and whether it is only a lower bound, being outside of them.

    Next to the lowest loss the parabola through three points counts, elsewhere straight lines over log lr.
    """
    finite = {i: loss for i, loss in losses.items() if math.isfinite(loss)}
    best, (centre, floor) = lowest(finite), vertex(finite)
    inside = min(finite) <= index <= max(finite)
    if {best - 1, best + 1} <= set(finite) and best - 1 <= index <= best + 1:
        curvature = finite[best - 1] - 2 * finite[best] + finite[best + 1]
        return floor + 0.5 * curvature * (index - centre) ** 2, False
    return float(np.interp(index, list(finite), list(finite.values()))), not inside
