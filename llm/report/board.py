"""Builds the leaderboard: one row per group at its best learning rate, and tests of the differences."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise

from llm.report.groups import Cell, Group
from llm.report.runs import Point, RunRecord
from llm.report.significance import Comparison, holm, welch
from llm.tables import format_bytes, format_count, format_seconds, format_table

ALPHA = 0.05
"""Largest corrected p-value at which a difference is reported as one."""


@dataclass(frozen=True)
class Row:
    """One group at its best learning rate. Figures are means over its finished seeds."""

    rank: int | None
    group: str
    lr: float | None
    loss: float | None
    standard_error: float | None
    seeds: int
    bits_per_byte: float | None
    tokens_to_loss: float | None
    seconds_to_loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    optimizer_state_bytes: float | None
    parameters: int | None
    finished: int
    pruned: int
    """Number of pruned runs at all learning rates."""
    runs: int
    """Number of runs at all learning rates."""
    is_bound: bool
    """Whether loss and bits per byte are upper bounds, as those of most objectives are."""


@dataclass(frozen=True)
class GroupComparison:
    """The comparison of two groups at their best learning rates."""

    first: str
    second: str
    comparison: Comparison
    p: float
    """p-value corrected for the number of pairs, NaN for groups with one seed or with pruned seeds."""
    is_selected: bool = False
    """Whether seeds were pruned, so that the remaining seeds were selected by their losses."""

    @property
    def word(self) -> str:
        """The conclusion about the first group against the second."""
        if math.isnan(self.comparison.difference):
            return "diverged"
        if self.is_selected:
            return "seeds pruned, no claim"
        if math.isnan(self.p):
            return "one seed, no claim"
        if self.p >= ALPHA:
            return "no difference seen"
        return "better" if self.comparison.difference < 0 else "worse"


def default_target(groups: Sequence[Group]) -> float | None:
    """Return the target loss for "tokens to" and "time to": the final loss of the middle group.

    Of an even number of groups it is the worse of the middle two.
    """
    means = sorted(group.best.mean for group in groups if math.isfinite(group.best.mean))
    return means[len(means) // 2] if means else None


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the mean of several curves at the token counts that all of them have."""
    by_tokens = [{point.tokens: point for point in curve} for curve in curves]
    shared = sorted(set.intersection(*map(set, by_tokens))) if by_tokens else []
    return [Point(*map(statistics.fmean, zip(*(c[tokens] for c in by_tokens), strict=True))) for tokens in shared]


def crossing(points: Sequence[Point], target: float) -> Point | None:
    """Return where a curve first reaches `target`, by linear interpolation, or None."""
    target += 1e-9 * abs(target)  # tolerance for a mean of the same losses in another order
    if points and points[0].loss <= target:
        return points[0]
    for before, after in pairwise(points):
        if after.loss <= target:
            share = (before.loss - target) / (before.loss - after.loss)
            return Point(*(a + share * (b - a) for a, b in zip(before, after, strict=True)))
    return None


def leaderboard(groups: Sequence[Group], target: float | None) -> list[Row]:
    """Return one row per group, best first. Groups without a finished run come last and have no rank."""
    rows, rank = [], 0
    for group in groups:
        cell = group.best
        is_ranked = math.isfinite(cell.mean)
        rank += is_ranked
        rows.append(_row(group, cell, rank if is_ranked else None, target))
    return rows


def _row(group: Group, cell: Cell, rank: int | None, target: float | None) -> Row:
    finished = [run for run in cell.runs if run.state == "finished"]
    reached = None if target is None else crossing(mean_curve([run.curve("val/loss") for run in finished]), target)
    return Row(
        rank=rank,
        group=group.label,
        lr=cell.lr,
        loss=_finite(cell.mean),
        standard_error=_finite(cell.error),
        seeds=len(cell.losses),
        bits_per_byte=_mean(finished, "bits_per_byte"),
        tokens_to_loss=None if reached is None else reached.tokens,
        seconds_to_loss=None if reached is None else reached.seconds,
        tokens_per_second=_mean(finished, "tokens_per_second"),
        mfu=_mean(finished, "mfu"),
        optimizer_state_bytes=_mean(finished, "optimizer_state_bytes"),
        parameters=next((run.summary["parameters"] for run in cell.runs if run.summary.get("parameters")), None),
        finished=sum(run.state == "finished" for run in group.runs),
        pruned=sum(cell.pruned for cell in group.cells),
        runs=len(group.runs),
        is_bound=any(run.summary.get("bound") is True for run in cell.runs),
    )


def _mean(runs: Sequence[RunRecord], key: str) -> float | None:
    values = [run.summary[key] for run in runs if isinstance(run.summary.get(key), int | float)]
    return statistics.fmean(values) if values else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def verdicts(groups: Sequence[Group]) -> list[GroupComparison]:
    """Compare every two groups at their best learning rates by Welch's test, with Holm's correction."""
    ranked = [group for group in groups if group.best.losses]
    pairs = []
    for first, second in combinations(ranked, 2):
        losses = [list(group.best.losses.values()) for group in (first, second)]
        diverged = not math.isfinite(sum(map(sum, losses)))
        counts = len(losses[0]), len(losses[1])
        comparison = Comparison(math.nan, math.nan, math.nan, math.nan, counts) if diverged else welch(*losses)
        is_selected = bool(first.best.pruned + second.best.pruned)
        if is_selected:
            comparison = comparison._replace(low=math.nan, high=math.nan, p=math.nan)
        pairs.append((first.label, second.label, comparison, is_selected))
    corrected = holm([comparison.p for _, _, comparison, _ in pairs])
    return [
        GroupComparison(a, b, comparison, p, sel) for (a, b, comparison, sel), p in zip(pairs, corrected, strict=True)
    ]


def to_csv(rows: Sequence[Row]) -> str:
    """Return the rows as CSV with numbers in full precision. Unknown values are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()


def to_text(rows: Sequence[Row], pairs: Sequence[GroupComparison], target: float | None) -> str:
    """Return the leaderboard and the comparisons for a terminal."""
    goal = "" if target is None else f" to {target:.3f}"
    goals = [f"tokens{goal}", f"seconds{goal}"]
    header = ["", "group", "best lr", "loss", "± s.e.", "seeds", *goals, "optimizer state", "MFU", "done"]
    table = [
        [
            "–" if row.rank is None else str(row.rank),
            row.group,
            _text(row.lr, "{:.3g}".format),
            _text(row.loss, ("<= {:.4f}" if row.is_bound else "{:.4f}").format),
            _text(row.standard_error, "{:.4f}".format),
            str(row.seeds),
            _text(row.tokens_to_loss, format_count),
            _text(row.seconds_to_loss, format_seconds),
            _text(row.optimizer_state_bytes, format_bytes),
            _text(row.mfu, "{:.1%}".format),
            f"{row.finished}/{row.runs}" + (f", {row.pruned} pruned" if row.pruned else ""),
        ]
        for row in rows
    ]
    return "\n".join([format_table(header, table), "", *sentences(pairs)]).rstrip()


def _text(value: float | None, form: Callable[[float], str]) -> str:
    return "–" if value is None else form(value)


def sentences(pairs: Sequence[GroupComparison], most: int = 6) -> list[str]:
    """Return the comparisons as sentences, those of the best group first."""
    if pairs and all(min(verdict.comparison.counts) < 2 for verdict in pairs):
        return ["  one seed per group: no claim about any difference; add seed=1,2,3"]
    lines = []
    for verdict in pairs[:most]:
        low, high, (n1, n2) = verdict.comparison.low, verdict.comparison.high, verdict.comparison.counts
        line = f"  {verdict.first} against {verdict.second}: {verdict.word}"
        if not math.isnan(verdict.p):
            line += f", {verdict.comparison.difference:+.4f} ({low:+.4f} to {high:+.4f})"
            line += f", p = {verdict.p:.2g}, {n1} and {n2} seeds"
        lines.append(line)
    if len(pairs) > most:
        lines.append(f"  and {len(pairs) - most} more pairs, in index.html")
    return lines
