"""Groups runs that differ only by learning rate and seed, and finds the settings that differ between groups."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import yaml

from llm.config.conf import conf_folder
from llm.report.runs import PRUNED, RunRecord
from llm.report.significance import standard_error

LR, SEED = "optimizer.lr", "seed"
RUN_KEYS = ("batch_tokens", "context_length", "max_tokens", "max_steps")
IGNORED_KEYS = ("name", "resume", "plan", "init_from", "micro_batch_size", "val_every", "checkpoint_every", "compile")
IGNORED_GROUPS = ("logger", "callbacks", "trainer", "loader", "hydra", "experiment")
"""Groups of settings that do not change what a model learns. They never split a group unless they were swept."""
TARGET = "._target_"


@dataclass(frozen=True)
class Cell:
    """Runs that differ only by their seed."""

    lr: float | None
    runs: list[RunRecord] = field(default_factory=list)

    @property
    def losses(self) -> dict[int, float]:
        """Final validation loss per seed, infinite where training diverged. Unfinished runs are excluded."""
        found = {}
        for index, run in enumerate(self.runs):
            is_diverged = run.state == "failed" and "not finite" in run.reason
            loss = math.inf if is_diverged else run.loss
            if loss is not None:
                found[int(run.config.get(SEED, index))] = loss
        return found

    @property
    def mean(self) -> float:
        """Mean of the losses, NaN where there is none."""
        losses = list(self.losses.values())
        return statistics.fmean(losses) if losses else math.nan

    @property
    def pruned(self) -> int:
        """Number of runs that the sweep pruned. Where it is above 0, the remaining losses are a selection."""
        return sum(run.state == PRUNED for run in self.runs)

    @property
    def error(self) -> float:
        """Standard error of the mean over seeds, NaN for fewer than two seeds or where one diverged."""
        losses = list(self.losses.values())
        return standard_error(losses) if losses and math.isfinite(sum(losses)) else math.nan


@dataclass(frozen=True)
class Group:
    """The runs of one combination of swept values, at each learning rate that was tried."""

    settings: dict[str, str]
    cells: list[Cell]

    @property
    def label(self) -> str:
        """The settings as on a command line. Options of groups such as optimizer are shown without their key."""
        is_one = len({run.config.get(LR) for run in self.runs}) == 1 and set(self.settings) == {LR}
        shown = [("lr" if is_one else key, value) for key, value in self.settings.items() if value]
        words = [value if key in _SHOWN_WITHOUT_KEY else f"{key}={value}" for key, value in shown]
        return " ".join(words) or str(self.cells[0].runs[0].config.get("name", "all runs"))

    @cached_property
    def best(self) -> Cell:
        """The learning rate with the lowest mean loss over the seeds that all rates share.

        Without shared seeds, each rate counts with its own seeds. Otherwise a rate that was tried with one lucky seed
        could win over a rate that was tried with several.
        """
        done = [cell for cell in self.cells if cell.losses] or self.cells
        shared = set.intersection(*(set(cell.losses) for cell in done))

        def score(cell: Cell) -> float:
            losses = [cell.losses[seed] for seed in shared] or list(cell.losses.values())
            return statistics.fmean(losses) if losses else math.inf

        return min(done, key=lambda cell: (score(cell), -len(cell.losses)))

    @property
    def runs(self) -> list[RunRecord]:
        """All runs of the group."""
        return [run for cell in self.cells for run in cell.runs]


_SHOWN_WITHOUT_KEY = ("optimizer", "model", "scaling", "schedule", "data", "tokenizer")


def value_of(run: RunRecord, key: str) -> str:
    """Return a run's value of a key as on a command line, "" where the run has no such key."""
    if key in run.choices:
        return run.choices[key]
    path = key.replace("/", ".")
    if path in run.config:
        return text_of(run.config[path])
    target = run.config.get(f"{path}{TARGET}")
    return "" if target is None else options(key).get(target) or target.rpartition(".")[2]


@cache
def options(group: str) -> dict[str, str]:
    """Return the name of each option of a configuration group by the class that it builds.

    Classes that several options build are omitted.
    """
    found: dict[str, list[str]] = {}
    for file in sorted((conf_folder() / group).glob("*.yaml")):
        target = (yaml.safe_load(file.read_text()) or {}).get("_target_")
        found.setdefault(str(target), []).append(file.stem)
    return {target: names[0] for target, names in found.items() if len(names) == 1}


def text_of(value: Any) -> str:
    """Return a value as it is written on a command line: null, true, [1,2], 0.001."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(text_of, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def swept_keys(runs: Sequence[RunRecord]) -> list[str]:
    """Return the smallest set of keys that distinguishes the runs, apart from seed and learning rate.

    Keys of command lines come first, then options of groups, classes, run-level keys and all others. A key is omitted
    where its value follows from keys before it: `max_steps` follows from `batch_tokens`, `betas` from the class.
    """
    runs = [run for run in runs if run.config]
    choices = sorted({key for run in runs for key in run.choices}) if all(run.choices for run in runs) else []
    config = {key for run in runs for key in run.config}
    targets = sorted((k for k in config if k.endswith(TARGET)), key=_depth)
    classes = [key.replace(".", "/") if options(key.replace(".", "/")) else key for key in map(_stem, targets)]
    rest = sorted((k for k in config if not k.endswith(TARGET) and k not in RUN_KEYS), key=_depth)
    given = list(dict.fromkeys(key for run in runs for key in run.overrides))
    by_name = [key for key in given if key in choices or key in config]
    swept = [k for k in by_name if k.split(".")[0] != "hydra" and k not in IGNORED_KEYS]
    implied = [k for k in [*choices, *classes, *RUN_KEYS, *rest] if _is_compared(k)]
    kept: list[str] = []
    for key in dict.fromkeys([*swept, *implied]):
        if key in (LR, SEED) or len({value_of(run, key) for run in runs}) < 2:
            continue
        if any(len({value_of(run, key) for run in cell}) > 1 for cell in _split(runs, kept).values()):
            kept.append(key)
    return kept


def _stem(target: str) -> str:
    return target.removesuffix(TARGET)


def _is_compared(key: str) -> bool:
    return key not in IGNORED_KEYS and key.replace("/", ".").split(".")[0] not in IGNORED_GROUPS


def _depth(key: str) -> tuple[int, str]:
    return key.count("."), key


def _split(runs: Sequence[RunRecord], keys: Sequence[str]) -> dict[tuple[str, ...], list[RunRecord]]:
    cells: dict[tuple[str, ...], list[RunRecord]] = {}
    for run in runs:
        cells.setdefault(tuple(value_of(run, key) for key in keys), []).append(run)
    return cells


def group_runs(runs: Sequence[RunRecord], keys: Sequence[str]) -> list[Group]:
    """Return one group per combination of values of `keys`, best group first, each with its runs by learning rate."""
    groups = []
    for values, members in _split([run for run in runs if run.config], keys).items():
        cells: dict[float | None, Cell] = {}
        for run in members:
            lr = run.config.get(LR)
            cells.setdefault(lr, Cell(lr)).runs.append(run)
        ordered = sorted(cells.values(), key=lambda cell: cell.lr or 0.0)
        groups.append(Group(dict(zip(keys, values, strict=True)), ordered))
    return sorted(groups, key=lambda group: (math.isnan(group.best.mean), group.best.mean, group.label))
