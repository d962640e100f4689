"""What differs between runs, and the runs that differ by nothing but rate and seed."""

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

CONF = conf_folder()
LR, SEED = "optimizer.lr", "seed"
RUN_KEYS = ("batch_tokens", "context_length", "max_tokens", "max_steps")
UNTOLD = ("name", "resume", "plan", "init_from", "micro_batch_size", "val_every", "checkpoint_every", "compile")
UNTOLD_GROUPS = ("logger", "callbacks", "trainer", "loader", "hydra", "experiment")
"""What changes nothing that was learned, so that it never splits a group, unless it was swept by name."""
TARGET = "._target_"


@dataclass(frozen=True)
class Cell:
    """Runs that differ by their seed alone."""

    lr: float | None
    runs: list[RunRecord] = field(default_factory=list)

    @property
    def losses(self) -> dict[int, float]:
        """Final validation loss by seed: infinite where training diverged; runs that came to no end do not count."""
        found = {}
        for index, run in enumerate(self.runs):
            is_diverged = run.state == "failed" and "not finite" in run.reason
            loss = math.inf if is_diverged else run.loss
            if loss is not None:
                found[int(run.config.get(SEED, index))] = loss
        return found

    @property
    def mean(self) -> float:
        """Mean of the losses, NaN without any."""
        losses = list(self.losses.values())
        return statistics.fmean(losses) if losses else math.nan

    @property
    def pruned(self) -> int:
        """Runs that were ended early because they fell behind: the losses left are a selection."""
        return sum(run.state == PRUNED for run in self.runs)

    @property
    def error(self) -> float:
        """Standard error of the mean over seeds, NaN for fewer than two, or where one diverged."""
        losses = list(self.losses.values())
        return standard_error(losses) if losses and math.isfinite(sum(losses)) else math.nan


@dataclass(frozen=True)
class Group:
    """One setting of the swept keys, at each learning rate that was tried."""

    settings: dict[str, str]
    cells: list[Cell]

    @property
    def label(self) -> str:
        """The settings as they would stand on a command line, values alone where a group's option says enough."""
        is_one = len({run.config.get(LR) for run in self.runs}) == 1 and set(self.settings) == {LR}
        shown = [("lr" if is_one else key, value) for key, value in self.settings.items() if value]
        words = [value if key in _SPEAKING else f"{key}={value}" for key, value in shown]
        return " ".join(words) or str(self.cells[0].runs[0].config.get("name", "all runs"))

    @cached_property
    def best(self) -> Cell:
        """The rate with the lowest loss over the seeds that all rates share; over each one's own where none is shared.

        Comparing on shared seeds keeps a rate tried with one lucky seed from winning over one tried with several.
        """
        done = [cell for cell in self.cells if cell.losses] or self.cells
        shared = set.intersection(*(set(cell.losses) for cell in done))

        def score(cell: Cell) -> float:
            losses = [cell.losses[seed] for seed in shared] or list(cell.losses.values())
            return statistics.fmean(losses) if losses else math.inf

        return min(done, key=lambda cell: (score(cell), -len(cell.losses)))

    @property
    def runs(self) -> list[RunRecord]:
        """All its runs."""
        return [run for cell in self.cells for run in cell.runs]


_SPEAKING = ("optimizer", "model", "scaling", "schedule", "data", "tokenizer")


def value_of(run: RunRecord, key: str) -> str:
    """Return a run's value of a key as it would stand on a command line; "" where it has no such key."""
    if key in run.choices:
        return run.choices[key]
    path = key.replace("/", ".")
    if path in run.config:
        return text_of(run.config[path])
    target = run.config.get(f"{path}{TARGET}")
    return "" if target is None else options(key).get(target) or target.rpartition(".")[2]


@cache
def options(group: str) -> dict[str, str]:
    """Return the option of a configuration group that builds each class; classes of several options are left out."""
    found: dict[str, list[str]] = {}
    for file in sorted((CONF / group).glob("*.yaml")):
        target = (yaml.safe_load(file.read_text()) or {}).get("_target_")
        found.setdefault(str(target), []).append(file.stem)
    return {target: names[0] for target, names in found.items() if len(names) == 1}


def text_of(value: Any) -> str:
    """Return a value in Hydra's grammar: null, true, [1,2], 0.001."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(text_of, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def swept_keys(runs: Sequence[RunRecord]) -> list[str]:
    """Return the fewest keys that tell the runs apart, seed and learning rate aside, most telling first.

    Keys set on command lines go before chosen options, those before classes, run-level keys and the rest. A key whose
    value follows from the ones before it is left out: `max_steps` follows from `batch_tokens`, `betas` from the class.
    """
    runs = [run for run in runs if run.config]
    choices = sorted({key for run in runs for key in run.choices}) if all(run.choices for run in runs) else []
    config = {key for run in runs for key in run.config}
    targets = sorted((k for k in config if k.endswith(TARGET)), key=_depth)
    classes = [key.replace(".", "/") if options(key.replace(".", "/")) else key for key in map(_stem, targets)]
    rest = sorted((k for k in config if not k.endswith(TARGET) and k not in RUN_KEYS), key=_depth)
    given = list(dict.fromkeys(key for run in runs for key in run.overrides))
    by_name = [key for key in given if key in choices or key in config]
    spoken = [k for k in by_name if k.split(".")[0] != "hydra" and k not in UNTOLD]
    quiet = [k for k in [*choices, *classes, *RUN_KEYS, *rest] if _tells(k)]
    kept: list[str] = []
    for key in dict.fromkeys([*spoken, *quiet]):
        if key in (LR, SEED) or len({value_of(run, key) for run in runs}) < 2:
            continue
        if any(len({value_of(run, key) for run in cell}) > 1 for cell in _split(runs, kept).values()):
            kept.append(key)
    return kept


def _stem(target: str) -> str:
    return target.removesuffix(TARGET)


def _tells(key: str) -> bool:
    return key not in UNTOLD and key.replace("/", ".").split(".")[0] not in UNTOLD_GROUPS


def _depth(key: str) -> tuple[int, str]:
    return key.count("."), key


def _split(runs: Sequence[RunRecord], keys: Sequence[str]) -> dict[tuple[str, ...], list[RunRecord]]:
    cells: dict[tuple[str, ...], list[RunRecord]] = {}
    for run in runs:
        cells.setdefault(tuple(value_of(run, key) for key in keys), []).append(run)
    return cells


def group_runs(runs: Sequence[RunRecord], keys: Sequence[str]) -> list[Group]:
    """Return the groups that `keys` tell apart, each with its runs by learning rate, best group first."""
    groups = []
    for values, members in _split([run for run in runs if run.config], keys).items():
        cells: dict[float | None, Cell] = {}
        for run in members:
            lr = run.config.get(LR)
            cells.setdefault(lr, Cell(lr)).runs.append(run)
        ordered = sorted(cells.values(), key=lambda cell: cell.lr or 0.0)
        groups.append(Group(dict(zip(keys, values, strict=True)), ordered))
    return sorted(groups, key=lambda group: (math.isnan(group.best.mean), group.best.mean, group.label))
