"""How far a job is, read from the end of its metrics.jsonl while it runs."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_TAIL_BYTES = 16_384


class Progress(NamedTuple):
    """Where a running job stands."""

    step: int
    total_steps: int | None
    loss: float | None
    seconds_left: float | None


class ProgressReader:
    """Follows jobs from outside, at the cost of a few reads; their first sight starts the clock for the time left."""

    def __init__(self) -> None:
        self._totals: dict[Path, int] = {}
        self._first: dict[Path, tuple[int, float]] = {}

    def read(self, folder: Path) -> Progress | None:
        """Return how far the run in `folder` is; None before its first update."""
        line = last_line(folder / "metrics.jsonl")
        if line is None:
            return None
        step, now = int(line["step"]), time.monotonic()
        first_step, since = self._first.setdefault(folder, (step, now))
        total = self.total_steps(folder)
        left = None
        if total is not None and step > first_step:
            left = max(0, total - step) * (now - since) / (step - first_step)
        return Progress(step, total, line.get("train/loss"), left)

    def total_steps(self, folder: Path) -> int | None:
        """Return how many updates the run in `folder` is to make; None while it has not said so."""
        if folder not in self._totals:
            try:
                config = yaml.load((folder / "config.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
                self._totals[folder] = int(config["max_steps"] or config["max_tokens"] // config["batch_tokens"])
            except (OSError, yaml.YAMLError, KeyError, TypeError):
                return None
        return self._totals[folder]


def last_line(path: Path) -> dict[str, Any] | None:
    """Return the last whole line of a file of JSON objects, or None."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            return record
    return None
