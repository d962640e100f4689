"""Decides which jobs of a sweep end early because their loss is too high, from run folders alone."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llm.run_folder.metrics_file import LineReader, Record
from llm.sweep.job_progress import ProgressReader
from llm.sweep.manifest import SweepJob, read_notes
from llm.tables import format_count

Rule = Literal["median", "halving"]


class Validation(NamedTuple):
    """One validation of a run. A loss that is not finite counts as infinite."""

    step: int
    tokens: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """A rule that ends jobs early.

    Jobs with the same seed are compared by their lowest validation loss up to the same number of tokens, so that an
    unlucky seed does not end a job. Jobs that have ended are included in the comparison.

    Source: `median` is the median stopping rule of Golovin et al. 2017 (Google Vizier, section 3.2.2); `halving` is
    asynchronous successive halving, Li et al. 2018 (arXiv 1810.05934, Algorithm 2).
    Differs: the median is taken over the losses of the other jobs, not over running averages, which lag behind a
    falling loss, and running jobs are included. Halving judges a job when it reaches a rung and never resumes a job
    that it ended, where Algorithm 2 pauses jobs and promotes them later. Both rules wait for `others` jobs.

    Args:
        rule: `median` ends a job whose loss is above the median of the others at any validation. `halving` ends a job
            that is not in the best 1 / `factor` at the first validation at or after each rung.
        after: share of a job's updates, in (0, 1), before which no job ends. It is also the first rung.
        factor: ratio between two rungs, and number of jobs that compete for one place, at least 2.
        others: other jobs that must have reached the same number of tokens, at least 1.
    """

    rule: Rule
    after: float
    factor: int
    others: int

    def judge(self, loss: float, others: Sequence[float]) -> str:
        """Return why a job with this loss should end, or ""."""
        if len(others) < self.others:
            return ""
        if self.rule == "median":
            median = statistics.median(others)
            return f"above {median:.4f}, the median of {len(others)} others" if loss > median else ""
        rank, count = 1 + sum(other < loss for other in others), 1 + len(others)
        places = max(1, count // self.factor)
        return f"number {rank} of {count}, of which {places} continue" if rank > places else ""

    def asks(self, before: float, now: float) -> bool:
        """Return whether to judge a job at a validation.

        Args:
            before: share of its updates at the validation before.
            now: share of its updates at this validation.
        """
        if not self.after <= now < 1:
            return False
        return self.rule == "median" or self._rung(before) < self._rung(now)

    def _rung(self, share: float) -> int:
        """Return the index of the last rung reached, -1 before the first."""
        if share < self.after:
            return -1
        return math.floor(math.log(share / self.after, self.factor) + 1e-9)  # tolerance for a share exactly at a rung


class Behind(NamedTuple):
    """A job that should end early: its loss and the reason."""

    loss: float
    why: str


class Pruner:
    """Applies a rule to one running job.

    Args:
        pruning: the rule.
        sweep: the sweep's folder.
        job: the running job.
    """

    def __init__(self, pruning: Pruning, sweep: Path, job: SweepJob) -> None:
        self.pruning, self.sweep, self.job = pruning, sweep, job
        self._lines, self._progress = LineReader(_validations_alone), ProgressReader()
        self._seen = 0

    def look(self) -> Behind | None:
        """Judge the validations that are new since the last call. Return why the job should end, or None."""
        own = self._validations(self.job)
        if len(own) <= self._seen:
            return None
        total = self._progress.total_steps(self.sweep / self.job.folder)
        if total is None:
            return None
        new, self._seen = range(self._seen, len(own)), len(own)
        for index in new:
            before = own[index - 1].step if index else 0
            if self.pruning.asks(before / total, own[index].step / total) and (why := self._judge(own[: index + 1])):
                return Behind(own[index].loss, why)
        return None

    def _judge(self, own: Sequence[Validation]) -> str:
        tokens = own[-1].tokens
        loss = min(found.loss for found in own)
        rivals = [
            best_by(found, tokens)
            for note in read_notes(self.sweep)
            if note.key != self.job.key and seed_of(note) == seed_of(self.job) and (found := self._validations(note))
        ]
        why = self.pruning.judge(loss, [rival for rival in rivals if rival is not None])
        return why and f"val/loss {loss:.4f} at {format_count(tokens)} tokens is {why}"

    def _validations(self, job: SweepJob) -> list[Validation]:
        lines = self._lines.read(self.sweep / job.folder / "metrics.jsonl")
        return [Validation(line["step"], line["tokens_seen"], _loss(line["val/loss"])) for line in lines]


def best_by(validations: Sequence[Validation], tokens: float) -> float | None:
    """Return the lowest loss up to so many tokens, None for a run without a validation at or after them."""
    if not validations or validations[-1].tokens < tokens:
        return None
    return min((found.loss for found in validations if found.tokens <= tokens), default=None)


def seed_of(job: SweepJob) -> str | None:
    """Return the override of a job's seed, None where there is none."""
    return next((override for override in job.overrides if override.startswith("seed=")), None)


def _validations_alone(line: Record) -> Record | None:
    keys = ("step", "tokens_seen", "val/loss")
    return {key: line[key] for key in keys} if all(key in line for key in keys) else None


def _loss(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.inf
