"""Computes everything that a report shows, from run folders alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm.report.board import GroupComparison, Row, default_target, leaderboard, verdicts
from llm.report.fits import Fit, fit_all
from llm.report.groups import LR, Group, group_runs, swept_keys
from llm.report.runs import RunReader, RunRecord, find_runs
from llm.report.sweeps import pending_jobs
from llm.report.useful_batch import UsefulBatch, useful_batches


@dataclass(frozen=True)
class Findings:
    """The contents of a report.

    Args:
        title: names of the folders.
        runs: all runs, finished or not.
        groups: the runs by setting, best group first.
        rows: the leaderboard.
        pairs: comparisons of groups.
        fits: power laws.
        useful: estimates of the useful batch.
        target: loss in nats per token for "tokens to" and "time to", None where no run has finished.
        states: the state of each run and of each job that has not started.
        is_open: whether a run or a sweep is still running.
    """

    title: str
    runs: list[RunRecord]
    groups: list[Group]
    rows: list[Row]
    pairs: list[GroupComparison]
    fits: list[Fit]
    useful: list[UsefulBatch]
    target: float | None
    states: list[str]
    is_open: bool


def analyze(folders: Sequence[Path], reader: RunReader, target: float | None) -> Findings:
    """Return the findings about all runs in `folders`.

    Raises:
        ConfigError: a folder is missing or contains no run.
    """
    runs = [reader.read(path) for path in find_runs(folders)]
    groups = group_runs(runs, swept_keys(runs) or [LR])  # where nothing else differs, learning rates are compared
    target = default_target(groups) if target is None else target
    remaining = pending_jobs(folders)
    states = [*(run.state for run in runs), *["pending"] * remaining.pending]
    return Findings(
        title=", ".join(folder.absolute().name for folder in folders[:3]) + (" …" if len(folders) > 3 else ""),
        runs=runs,
        groups=groups,
        rows=leaderboard(groups, target),
        pairs=verdicts(groups),
        fits=fit_all(groups),
        useful=useful_batches(groups),
        target=target,
        states=states,
        is_open=remaining.is_open or "running" in states,
    )
