"""Statistics for few runs: Welch's test with Holm's correction, and power laws with confidence intervals."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95
"""Probability that an interval contains the true value."""


class Comparison(NamedTuple):
    """The difference between the mean losses of two groups."""

    difference: float
    """Mean of the first group minus mean of the second."""
    low: float
    high: float
    """Ends of the difference's 95 % confidence interval, NaN where a group has one member."""
    p: float
    """Probability of a difference at least this large between equal groups, NaN where a group has one member."""
    counts: tuple[int, int]


class PowerLaw(NamedTuple):
    """y = coefficient * x ** exponent, fitted to logarithms by least squares."""

    coefficient: float
    exponent: float
    low: float
    high: float
    """Ends of the exponent's 95 % confidence interval, NaN for fewer than three distinct x."""
    points: int

    def at(self, x: float) -> float:
        """Return y at `x`."""
        return self.coefficient * x**self.exponent


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean, NaN for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def welch(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare the means of two groups whose variances may differ.

        t = (m1 - m2) / sqrt(v1/n1 + v2/n2),   dof = (v1/n1 + v2/n2)² / ((v1/n1)²/(n1-1) + (v2/n2)²/(n2-1))

    Where both variances are 0, p is 1 for equal means and 0 otherwise. Where a group has one member, p is NaN.

    Source: Welch, "The generalization of Student's problem when several different population variances are involved",
    Biometrika 34 (1947), with Satterthwaite's degrees of freedom.
    """
    counts = len(first), len(second)
    difference = statistics.fmean(first) - statistics.fmean(second)
    if min(counts) < 2:
        return Comparison(difference, math.nan, math.nan, math.nan, counts)
    shares = [statistics.variance(values) / len(values) for values in (first, second)]
    total = sum(shares)
    if total == 0.0:
        return Comparison(difference, difference, difference, 1.0 if difference == 0 else 0.0, counts)
    dof = total**2 / sum(share**2 / (count - 1) for share, count in zip(shares, counts, strict=True))
    t = difference / math.sqrt(total)
    half = student_quantile(0.5 + CONFIDENCE / 2, dof) * math.sqrt(total)
    return Comparison(difference, difference - half, difference + half, 2 * student_tail(abs(t), dof), counts)


def holm(chances: Sequence[float]) -> list[float]:
    """Return p-values corrected for the number of comparisons. NaN stays NaN and is not counted.

    The smallest p-value is multiplied by the number of comparisons, the next by one less, and so on. A corrected value
    is never below the one before it.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).
    """
    order = sorted((p, i) for i, p in enumerate(chances) if not math.isnan(p))
    corrected, largest = list(chances), 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[i] = largest
    return corrected


def power_law(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw | None:
    """Fit y = coefficient * x ** exponent to positive points. Return None for fewer than two distinct x."""
    if len(set(xs)) < 2:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    exponent, intercept = statistics.linear_regression([x for x, _ in logs], [y for _, y in logs])
    low = high = math.nan
    if len(logs) > 2 and len(set(xs)) > 2:
        centre = statistics.fmean(x for x, _ in logs)
        spread = sum((x - centre) ** 2 for x, _ in logs)
        rest = sum((y - intercept - exponent * x) ** 2 for x, y in logs)
        error = math.sqrt(rest / (len(logs) - 2) / spread)
        half = student_quantile(0.5 + CONFIDENCE / 2, len(logs) - 2) * error
        low, high = exponent - half, exponent + half
    return PowerLaw(math.exp(intercept), exponent, low, high, len(logs))


def student_tail(t: float, dof: float) -> float:
    """Return the probability that Student's t exceeds `t`."""
    return float(stdtr(dof, -t))


def student_quantile(chance: float, dof: float) -> float:
    """Return the value that Student's t stays below with probability `chance`."""
    return float(stdtrit(dof, chance))
