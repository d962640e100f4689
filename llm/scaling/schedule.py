"""Learning-rate schedules: pure functions lr_factor = f(step) in [0, 1]; step 0 is the first update.

A duration below 1 is a share of the run; any other is a number of steps. The warm-up is linear, and no update has a
factor of zero: with w warm-up steps the first factors are 1/w, 2/w, …, 1.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Literal

from llm.errors import ConfigError


def constant(step: int, *, total_steps: int, warmup: float) -> float:
    """Return a factor that rises during the warm-up and then stays at 1.

    Args:
        step: updates done before this one.
        total_steps: updates in the run.
        warmup: duration of the linear rise.
    """
    return _warmup_factor(step, _steps("schedule.warmup", warmup, total_steps))


def cosine(step: int, *, total_steps: int, warmup: float, floor: float) -> float:
    """Return a factor that rises during the warm-up, then falls along half a cosine to `floor` at the last step.

    Args:
        step: updates done before this one.
        total_steps: updates in the run.
        warmup: duration of the linear rise.
        floor: last factor, in [0, 1].

    Source: Loshchilov & Hutter, "SGDR", arXiv:1608.03983, eq. 5, without restarts.
    """
    _check_factor("schedule.floor", floor)
    rise = _steps("schedule.warmup", warmup, total_steps)
    if step < rise:
        return _warmup_factor(step, rise)
    progress = min(1.0, (step - rise) / max(1, total_steps - 1 - rise))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def inverse_time(step: int, *, total_steps: int, warmup: float, half_life: float) -> float:
    """Return a factor that rises during the warm-up, then falls as 1 / (1 + t/T), where t starts at its end.

    Args:
        step: updates done before this one.
        total_steps: updates in the run.
        warmup: duration of the linear rise.
        half_life: T, the duration after which the factor is one half; above 0.

    Source: Tian & Parikh, "Amos", arXiv:2210.11693, section 4; Su, kexue.fm/archives/9344, where the rate falls as
    the weights approach their final values; that page prefers this form to 1 / (1 + t/T)².
    """
    rise = _steps("schedule.warmup", warmup, total_steps)
    half = half_life * total_steps if half_life < 1 else half_life
    if half <= 0:
        raise ConfigError(f"schedule.half_life={half_life}: must be above 0; try 0.2")
    return _warmup_factor(step, rise) if step < rise else 1 / (1 + (step - rise) / half)


def wsd(
    step: int, *, total_steps: int, warmup: float, decay: float, floor: float, shape: Literal["linear", "sqrt"]
) -> float:
    """Return a factor that rises during the warm-up, stays at 1, then falls to `floor` in the last part of the run.

    Args:
        step: updates done before this one.
        total_steps: updates in the run.
        warmup: duration of the linear rise.
        decay: duration of the fall.
        floor: last factor, in [0, 1].
        shape: shape of the fall as a function of its progress p: `linear` is 1 − p, `sqrt` is 1 − √p.

    Source: Hu et al., "MiniCPM", arXiv:2404.06395, eq. 1; the 1 − sqrt shape from Hägele et al., arXiv:2405.18392.
    """
    _check_factor("schedule.floor", floor)
    if shape not in ("linear", "sqrt"):
        raise ConfigError(f"schedule.shape={shape}: unknown; choose linear or sqrt")
    rise, fall = _steps("schedule.warmup", warmup, total_steps), _steps("schedule.decay", decay, total_steps)
    if rise + fall > total_steps:
        raise ConfigError(
            f"schedule.decay={decay}: warm-up ({rise} steps) and decay ({fall}) exceed the run ({total_steps}); "
            "shorten one"
        )
    start = total_steps - fall
    if step < start:
        return _warmup_factor(step, rise)
    progress = min(1.0, (step + 1 - start) / fall) if fall else 0.0
    return 1 - (1 - floor) * (math.sqrt(progress) if shape == "sqrt" else progress)


def piecewise(step: int, *, total_steps: int, points: Mapping[float, float]) -> float:
    """Return a factor that is linear between (0, 0) and the `points` {time: factor}, and constant after the last.

    Args:
        step: updates done before this one.
        total_steps: updates in the run.
        points: factors by time, in rising order. A time written as a float up to 1.0 is a share of the run; any other
            is a number of steps.

    Raises:
        ConfigError: if there are no points, the times do not rise, or a factor is outside [0, 1].

    Source: the schedule of Su's Tiger, kexue.fm/archives/9512, with time in updates instead of micro-batches.
    """
    knots = _knots(points, total_steps)
    now = step + 1
    for (left, low), (right, high) in itertools.pairwise(knots):
        if now <= right:
            return low + (high - low) * (now - left) / (right - left)
    return knots[-1][1]


def _knots(points: Mapping[float, float], total_steps: int) -> list[tuple[float, float]]:
    if not points:
        raise ConfigError("schedule.points={}: needs at least one point; try {0.02: 1.0, 1.0: 0.1}")
    for time, factor in points.items():
        _check_factor(f"schedule.points[{time}]", factor)
    times = [float(t) * total_steps if isinstance(t, float) and t <= 1 else float(t) for t in points]
    knots = list(zip(times, map(float, points.values()), strict=True))
    if knots[0][0] > 0:
        knots.insert(0, (0.0, 0.0))
    if any(right <= left for (left, _), (right, _) in itertools.pairwise(knots)):
        raise ConfigError(f"schedule.points={dict(points)}: times must rise; sort them")
    return knots


def _warmup_factor(step: int, rise: int) -> float:
    return min(1.0, (step + 1) / rise) if rise else 1.0


def _steps(key: str, duration: float, total_steps: int) -> int:
    if duration < 0 or duration > total_steps:
        raise ConfigError(f"{key}={duration}: must lie between 0 and the run's {total_steps} steps; try 0.02")
    return round(duration * total_steps) if duration < 1 else round(duration)


def _check_factor(key: str, factor: float) -> None:
    if not 0 <= factor <= 1:
        raise ConfigError(f"{key}={factor}: must lie in [0, 1]; peak rates are set by optimizer.lr")
