"""Reads the progress of a running job from the end of its metrics.jsonl."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_TAIL_BYTES = 16_384
"""Bytes read from the end of metrics.jsonl, enough for several lines of a model with many layers."""


class Progress(NamedTuple):
    """The progress of a running job."""

    step: int
    total_steps: int | None
    loss: float | None
    seconds_left: float | None


class ProgressReader:
    """A reader of the progress of jobs. It estimates the remaining time from the speed since it first saw a job."""

    def __init__(self) -> None:
        self._totals: dict[Path, int] = {}
        self._first: dict[Path, tuple[int, float]] = {}

    def read(self, folder: Path) -> Progress | None:
        """Return the progress of the run in `folder`, None before its first update."""
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
        """Return the planned updates of the run in `folder`, None until it has a configuration."""
        if folder not in self._totals:
            try:
                config = yaml.load((folder / "config.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
                self._totals[folder] = int(config["max_steps"] or config["max_tokens"] // config["batch_tokens"])
            except (OSError, yaml.YAMLError, KeyError, TypeError):
                return None
        return self._totals[folder]


def last_line(path: Path) -> dict[str, Any] | None:
    """Return the last complete line with a step of a file of JSON objects, or None."""
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
