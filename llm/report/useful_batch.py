"""Estimates the useful batch from noise scales and from sweeps over the batch, and compares runs with it."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llm.errors import ConfigError
from llm.report.board import crossing, mean_curve
from llm.report.fits import BATCH, families
from llm.report.groups import Group
from llm.report.runs import RunRecord
from llm.scaling.derivation import thousands
from llm.scaling.trade import Trade, fit_trade, past_useful_batch

MEASURED, GIVEN = "noise_scale", "scaling.noise_scale"
LENGTHS = ("max_steps", "max_tokens")
RAMP = "batch_schedule._target_"


@dataclass(frozen=True)
class UsefulBatch:
    """The batch at which updates and tokens are both twice their minimum, and the batches of some runs.

    Args:
        subject: the settings that the estimate is for.
        source: how it was estimated.
        tokens: the useful batch in tokens, None where the runs do not determine it.
        batches: tokens per update of the runs.
        points: updates and tokens that each batch of a sweep needed for the same loss.
        trade: the minimum of updates and of tokens, fitted to the points.
        caution: why there is no estimate, or a limitation of it, or "".
    """

    subject: str
    source: str
    tokens: float | None
    batches: list[int]
    points: list[tuple[float, float]]
    trade: Trade | None
    caution: str

    @property
    def lines(self) -> list[str]:
        """The estimate as text: one line, and one line per batch."""
        if self.tokens is None:
            return [f"{self.subject}: no useful batch from the {self.source}: {self.caution}"]
        least = ""
        if self.trade is not None:
            updates, tokens = self.trade
            least = f"; at least {updates:,.0f} updates, at least {thousands(tokens)} tokens"
        head = f"{self.subject}: useful batch {thousands(self.tokens)} tokens, by the {self.source}{least}"
        words = [past_useful_batch(batch_tokens=batch, noise_scale=self.tokens) for batch in self.batches]
        compared = [f"  {BATCH}={batch}: {word}" for batch, word in zip(self.batches, words, strict=True)]
        return [head, *compared, *([f"  {self.caution}"] if self.caution else [])]


def useful_batches(groups: Sequence[Group]) -> list[UsefulBatch]:
    """Return the estimates from noise scales and from sweeps over the batch."""
    return [*_from_noise(groups), *_from_sweeps(groups)]


def useful_text(found: Sequence[UsefulBatch]) -> str:
    """Return the estimates for a terminal, "" where there is none."""
    lines = [f"  {line}" for useful in found for line in useful.lines]
    return "\n".join(["Useful batch: (S/S_min - 1)(E/E_min - 1) = 1", *lines]) if lines else ""


def _from_noise(groups: Sequence[Group]) -> Iterator[UsefulBatch]:
    """Yield one estimate per group: the noise scale measured in training, else that of the scaling rule."""
    for group in groups:
        runs = [run for run in group.best.runs if run.state == "finished"]
        for read, source in (
            (lambda run: run.summary.get(MEASURED), "noise scale measured while training"),
            (lambda run: run.config.get(GIVEN), f"noise scale of {GIVEN}"),
        ):
            scales = [float(scale) for scale in map(read, runs) if _is_positive(scale)]
            batch = next((run.config[BATCH] for run in runs if run.config.get(BATCH)), None)
            if scales and batch:
                yield UsefulBatch(group.label, source, statistics.geometric_mean(scales), [int(batch)], [], None, "")
                break


def _is_positive(scale: object) -> bool:
    return isinstance(scale, int | float) and not isinstance(scale, bool) and 0 < scale < math.inf


def _from_sweeps(groups: Sequence[Group]) -> Iterator[UsefulBatch]:
    """Yield one estimate per set of groups that differ only by batch and length, at the worst of their final losses."""
    steady = [group for group in groups if not any(_is_ramped(run) for run in group.runs)]
    for shared, members in families(steady, [BATCH, *LENGTHS]):
        ended = [group for group in members if math.isfinite(group.best.mean) and group.runs[0].config.get(BATCH)]
        if len({group.runs[0].config[BATCH] for group in ended}) < 2:
            continue
        target = max(group.best.mean for group in ended)
        subject = " ".join(f"{key}={value}" for key, value in shared.items() if value) or "all runs"
        yield _fitted(subject, target, sorted(ended, key=lambda group: group.runs[0].config[BATCH]))


def _is_ramped(run: RunRecord) -> bool:
    return not str(run.config.get(RAMP, "constant")).endswith("constant")


def _fitted(subject: str, target: float, groups: Sequence[Group]) -> UsefulBatch:
    """Fit the hyperbola to the updates and tokens that each batch needed to reach `target`."""
    reached, late = {}, []
    for group in groups:
        batch = int(group.runs[0].config[BATCH])
        curve = mean_curve([run.curve("val/loss") for run in group.best.runs if run.state == "finished"])
        point = crossing(curve, target)
        if point is None or point == curve[0]:
            late.append(str(batch))
        else:
            reached[batch] = point.tokens
    source = f"sweep, to loss {target:.3f}"
    caution = f"{BATCH}={','.join(late)}: no validation before that loss; lower val_every" if late else ""
    points = [(tokens / batch, tokens) for batch, tokens in reached.items()]
    try:
        trade = fit_trade([updates for updates, _ in points], [tokens for _, tokens in points])
    except ConfigError as error:
        reason = caution or str(error).partition(": ")[2]
        return UsefulBatch(subject, source, None, list(reached), points, None, reason)
    caution = caution or ("two batches: the quality of the fit is unknown" if len(points) < 3 else "")
    return UsefulBatch(subject, source, trade.critical_batch_tokens, list(reached), points, trade, caution)
