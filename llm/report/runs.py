"""Reads run folders, finished or not: configuration, figures, curves and state."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from llm.config.renamed import with_present_targets
from llm.errors import ConfigError
from llm.report.sweeps import holds_sweep, sweeps_in
from llm.run_folder.folder import RunFolder
from llm.run_folder.metrics_file import LineReader, Record

PRUNED = "pruned"
"""The state of a run that its sweep stopped because its loss was too high compared with the other jobs."""
KEPT = ("step", "tokens_seen", "train/loss", "val/loss", "training_seconds", "tokens_per_second")
KEPT_ENDINGS = ("/expert_load_global", "/codebook_usage", "/codebook_perplexity")
FLOPS_PER_PARAMETER = 6
"""Training FLOPs per token and active parameter, for runs whose summary has no figure. Attention is excluded."""


class Point(NamedTuple):
    """One measurement of the loss."""

    tokens: float
    seconds: float
    flops: float
    loss: float


@dataclass(frozen=True)
class RunRecord:
    """The contents of one run folder.

    Args:
        folder: its path.
        config: its configuration with dotted keys, `{"optimizer.lr": 0.001, …}`.
        choices: the option of each configuration group, where Hydra recorded it.
        overrides: the keys that its command line set.
        summary: contents of summary.json.
        lines: the metrics in metrics.jsonl that a report uses.
        job: contents of job.json for a job of a sweep, else empty.
        is_live: whether a process is writing to the folder.
        extrapolation: loss by context length, where it was evaluated.
    """

    folder: Path
    config: dict[str, Any]
    choices: dict[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    job: dict[str, Any] = field(default_factory=dict)
    is_live: bool = False
    extrapolation: dict[int, float] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """One of pending, running, finished, pruned, stopped, failed, died."""
        word = str(self.summary.get("status") or "").split(":")[0]
        if word == "stopped" and self.job.get("state") == PRUNED:
            return PRUNED
        if word == "finished" or (word and word != "running"):
            return word
        if self.is_live:
            return "running"
        if self.job.get("state") not in (None, "running"):
            return str(self.job["state"])
        return "died" if word == "running" else "pending"

    @property
    def reason(self) -> str:
        """Why the run failed or stopped, or ""."""
        status = "" if self.state == PRUNED else str(self.summary.get("status") or "").partition(": ")[2]
        return status or str(self.job.get("reason") or "")

    @property
    def loss(self) -> float | None:
        """The final validation loss, infinite where training diverged, None for a run that has not finished."""
        loss = self.summary.get("val/loss")
        if self.state == "finished":
            return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else math.inf
        return None

    @property
    def latest_loss(self) -> float | None:
        """The latest validation loss."""
        points = self.curve("val/loss")
        return points[-1].loss if points else None

    @property
    def total_steps(self) -> int:
        """Planned number of optimizer updates."""
        if self.config.get("max_steps") is not None:
            return int(self.config["max_steps"])
        return max(1, int(self.config.get("max_tokens") or 0) // max(1, int(self.config.get("batch_tokens") or 1)))

    @property
    def progress(self) -> float:
        """Share of the planned updates that are done, from 0 to 1."""
        step = self.lines[-1]["step"] if self.lines else 0
        return 1.0 if self.state == "finished" else min(1.0, step / self.total_steps)

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs per token, estimated as 6 per active parameter where the summary has no figure."""
        stated = self.summary.get("flops_per_token")
        return float(stated or FLOPS_PER_PARAMETER * (self.summary.get("active_parameters") or math.nan))

    @cached_property
    def seconds(self) -> list[float]:
        """Training seconds at each line, from the line itself or from the throughput before it."""
        elapsed, tokens, out = 0.0, 0.0, []
        for line in self.lines:
            speed = line.get("tokens_per_second")
            if isinstance(line.get("training_seconds"), int | float):
                elapsed = line["training_seconds"]
            elif isinstance(speed, int | float) and speed > 0:
                elapsed += (line.get("tokens_seen", tokens) - tokens) / speed
            tokens = line.get("tokens_seen", tokens)
            out.append(elapsed)
        return out

    def curve(self, metric: str) -> list[Point]:
        """Return a loss over tokens, seconds and FLOPs, without values that are not finite."""
        return [
            Point(line["tokens_seen"], seconds, line["tokens_seen"] * self.flops_per_token, float(line[metric]))
            for line, seconds in zip(self.lines, self.seconds, strict=True)
            if isinstance(line.get(metric), int | float) and "tokens_seen" in line
        ]


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Return the run folders in and under `folders`, in natural order of their names.

    Raises:
        ConfigError: a folder is missing, or contains neither a run nor a sweep.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; name a run folder, or a folder that contains run folders")
        under = sorted((p.parent for p in _marked(folder)), key=_natural)
        if not under and not holds_sweep(folder):
            raise ConfigError(f"{folder}: contains no run; name a run folder (runs/…) or a sweep's folder (multirun/…)")
        found |= dict.fromkeys(under)
    return list(found)


def _marked(folder: Path) -> Iterator[Path]:
    """Yield one file per run: its configuration, or job.json of a job that failed before it had a configuration."""
    sweeps = {sweep for sweep, _ in sweeps_in(folder)}
    for path in folder.rglob("config.yaml"):
        is_foreign = not (path.parent / "job.json").is_file() and sweeps & {*path.parents}  # not a job of the sweep
        if path.parent.name != ".hydra" and ".git" not in path.parts and not is_foreign:
            yield path
    for path in folder.rglob("job.json"):
        if not (path.parent / "config.yaml").is_file():
            yield path


def _natural(path: Path) -> tuple[Any, ...]:
    number = path.name.split("_")[0]
    return (str(path.parent), int(number) if number.isdigit() else math.inf, path.name)


class RunReader:
    """A reader of run folders that parses each line of metrics only once."""

    def __init__(self) -> None:
        self._lines = LineReader(_kept)

    def read(self, folder: Path) -> RunRecord:
        """Return the current contents of a run folder."""
        hydra = folder / ".hydra"
        choices = _yaml(hydra / "hydra.yaml").get("hydra", {}).get("runtime", {}).get("choices", {})
        overrides = _yaml(hydra / "overrides.yaml", list)
        job = _json(folder / "job.json")
        return RunRecord(
            folder=folder,
            config=flatten(with_present_targets(_yaml(folder / "config.yaml"))),
            choices={k.split("@")[0]: str(v) for k, v in choices.items() if not k.startswith("hydra/") and v},
            overrides=tuple(str(o).lstrip("+~").split("=")[0] for o in job.get("overrides", overrides)),
            summary=_json(folder / "summary.json"),
            lines=self._lines.read(folder / "metrics.jsonl"),
            job=job,
            is_live=RunFolder(folder, is_writer=False).is_live(),
            extrapolation=_extrapolation(_json(folder / "eval" / "extrapolation.json")),
        )


def _kept(line: Record) -> Record:
    return {k: v for k, v in line.items() if k in KEPT or k.endswith(KEPT_ENDINGS)}


def flatten(node: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return a nested mapping as a flat one with dotted keys. Lists are values."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        where = f"{path}.{key}" if path else str(key)
        flat |= flatten(value, where) if isinstance(value, Mapping) and value else {where: value}
    return flat


def _yaml(path: Path, kind: type = dict) -> Any:
    try:
        value = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        return kind()
    return value if isinstance(value, kind) else kind()


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _extrapolation(results: Mapping[str, Any]) -> dict[int, float]:
    """Return the loss by context length from eval/extrapolation.json.

    The entry of a length is the loss, a list that starts with the loss, or a mapping with `val/loss`.
    """
    points = {}
    for length, value in dict(results.get("by_context") or results).items():
        loss = value[0] if isinstance(value, list) and value else value
        loss = loss.get("val/loss", loss.get("loss")) if isinstance(loss, Mapping) else loss
        if str(length).isdigit() and isinstance(loss, int | float):
            points[int(length)] = float(loss)
    return points
