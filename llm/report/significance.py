"""Statistics of few runs: Welch's test, Holm's correction, power laws with their confidence."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Comparison(NamedTuple):
    """Two groups of losses held against each other."""

    difference: float
    """Mean of the first minus mean of the second."""
    low: float
    high: float
    """Ends of the difference's 95 % confidence interval; NaN where a group has one member."""
    p: float
    """Chance of so large a difference if there were none; NaN where a group has one member."""
    counts: tuple[int, int]


class PowerLaw(NamedTuple):
    """y = coefficient * x ** exponent, fitted to logarithms by least squares."""

    coefficient: float
    exponent: float
    low: float
    high: float
    """Ends of the exponent's 95 % confidence interval; NaN for fewer than three distinct x."""
    points: int

    def at(self, x: float) -> float:
        """Return y at `x`."""
        return self.coefficient * x**self.exponent


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; NaN for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def welch(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare two means whose spreads may differ.

        t = (m1 - m2) / sqrt(v1/n1 + v2/n2),   dof = (v1/n1 + v2/n2)² / ((v1/n1)²/(n1-1) + (v2/n2)²/(n2-1))

    Two groups without any spread are equal (p = 1) or not (p = 0). Groups of one make no claim: p is NaN.

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
    """Return p-values corrected for being many: the smallest times their number, and so on, never decreasing.

    NaN stays NaN and does not count.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).
    """
    order = sorted((p, i) for i, p in enumerate(chances) if not math.isnan(p))
    corrected, largest = list(chances), 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[i] = largest
    return corrected


def power_law(xs: Sequence[float], ys: Sequence[float]) -> PowerLaw | None:
    """Fit y = coefficient * x ** exponent through positive points; None for fewer than two distinct x."""
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
    """Return the chance that Student's t exceeds `t` >= 0: half the incomplete beta at dof / (dof + t²)."""
    return 0.5 * incomplete_beta(dof / (dof + t * t), dof / 2, 0.5)


def student_quantile(chance: float, dof: float) -> float:
    """Return the t that is exceeded with probability 1 - `chance`, for chance in (0.5, 1) and t below 1e4."""
    return _root(lambda t: 1 - chance - student_tail(t, dof), 0.0, 1e4)


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Return where a rising function passes zero, by halving."""
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), to about 1e-14.

    Source: the continued fraction of DLMF 8.17.22, evaluated by Lentz's method.
    """
    if x <= 0.0 or x >= 1.0:
        return min(max(x, 0.0), 1.0)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, the mirrored one is quick
        return 1.0 - incomplete_beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300  # stands for a zero that would be divided by
    upper, lower = 1.0, 1.0 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction = lower
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for step in (even, odd):
            lower = 1.0 / (1 + step * lower or tiny)
            upper = 1 + step / upper or tiny
            fraction *= lower * upper
        if abs(lower * upper - 1) < 1e-15:
            break
    return math.exp(log_front) * fraction / a
