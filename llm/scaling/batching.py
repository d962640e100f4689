"""Derives micro-batches and gradient accumulation from the tokens per update; no other module derives them."""

from collections.abc import Mapping
from dataclasses import dataclass

from llm.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """The division of an update into accumulation x world_size x micro_batch_size windows of context_length tokens."""

    batch_tokens: int
    context_length: int
    world_size: int
    micro_batch_size: int

    @property
    def windows(self) -> int:
        """Number of windows per update."""
        return self.batch_tokens // self.context_length

    @property
    def accumulation(self) -> int:
        """Number of micro-batches per update on each device."""
        return self.windows // (self.world_size * self.micro_batch_size)


def plan_batch(*, batch_tokens: int, context_length: int, world_size: int, micro_batch_size: int) -> BatchPlan:
    """Return the plan of an update.

    Raises:
        ConfigError: if a value is below 1, or batch_tokens is not a whole number of micro-batches on every device; the
            message names the nearest valid values.
    """
    values = {"batch_tokens": batch_tokens, "context_length": context_length, "micro_batch_size": micro_batch_size}
    for key, value in values.items():
        if value < 1:
            raise ConfigError(f"{key}={value}: must be at least 1; give a positive whole number")
    unit = context_length * world_size * micro_batch_size
    if batch_tokens % unit:
        below = batch_tokens // unit * unit
        near = " or ".join(str(v) for v in (below, below + unit) if v)
        windows = batch_tokens // (context_length * world_size)
        is_whole = batch_tokens % (context_length * world_size) == 0
        smaller = [size for size in range(micro_batch_size - 1, 0, -1) if is_whole and windows % size == 0]
        remedy = f"set micro_batch_size={smaller[0]}, or batch_tokens={near}" if smaller else f"try {near}"
        raise ConfigError(
            f"batch_tokens={batch_tokens}: must be a multiple of context_length {context_length} x devices "
            f"{world_size} x micro_batch_size {micro_batch_size} = {unit}; {remedy}"
        )
    return BatchPlan(batch_tokens, context_length, world_size, micro_batch_size)


def micro_batch_candidates(*, batch_tokens: int, context_length: int, world_size: int, least: int = 1) -> list[int]:
    """Return the micro-batch sizes that divide an update, largest first.

    Args:
        batch_tokens: tokens per update.
        context_length: tokens per window.
        world_size: number of devices.
        least: smallest number of micro-batches per update, over all devices. A micro-batch of one window is always a
            candidate, even where it gives fewer.

    Raises:
        ConfigError: if batch_tokens is not a whole number of windows on every device.
    """
    windows = plan_batch(
        batch_tokens=batch_tokens, context_length=context_length, world_size=world_size, micro_batch_size=1
    ).accumulation
    return [n for n in range(windows, 0, -1) if windows % n == 0 and (n == 1 or windows // n * world_size >= least)]


def total_steps(*, max_steps: int | None, max_tokens: int | None, batch_tokens: int) -> int:
    """Return the number of updates of the run.

    Raises:
        ConfigError: if neither or both limits are set, or the limit allows no update.
    """
    if (max_steps is None) == (max_tokens is None):
        raise ConfigError(
            f"max_steps={max_steps}, max_tokens={max_tokens}: exactly one must be set; set the other to null"
        )
    steps = max_steps if max_steps is not None else (max_tokens or 0) // batch_tokens
    if steps < 1:
        key, value = ("max_steps", max_steps) if max_steps is not None else ("max_tokens", max_tokens)
        raise ConfigError(f"{key}={value}: gives {steps} updates of {batch_tokens} tokens; raise it")
    return steps


@dataclass(frozen=True)
class BatchRamp:
    """The tokens per update as a function of the step, in stages within which all updates are equal."""

    stages: tuple[tuple[int, int, int], ...]
    """Stages as (first step, tokens seen before it, tokens per update), in the order of steps."""
    total_steps: int

    def _stage(self, step: int) -> tuple[int, int, int]:
        return next(stage for stage in reversed(self.stages) if stage[0] <= step)

    def batch_tokens_at(self, step: int) -> int:
        """Return the number of tokens of the update that follows `step` updates."""
        return self._stage(step)[2]

    def tokens_seen(self, step: int) -> int:
        """Return the number of tokens of the first `step` updates together."""
        first, seen, batch_tokens = self._stage(step)
        return seen + (step - first) * batch_tokens


def plan_ramp(changes: Mapping[int, int], *, max_steps: int | None, max_tokens: int | None) -> BatchRamp:
    """Return the stages of a run; each stage begins at the first update before which its tokens have been seen.

    Args:
        changes: tokens seen -> tokens per update from then on; the first key is 0.
        max_steps: number of updates of the run, or None if max_tokens is set.
        max_tokens: number of tokens of the run, or None if max_steps is set.

    Raises:
        ConfigError: if neither or both limits are set, or the limit allows no update.
    """
    starts = sorted(changes)
    steps = total_steps(max_steps=max_steps, max_tokens=max_tokens, batch_tokens=changes[0])
    stages, step, seen = [], 0, 0
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        batch_tokens = changes[start]
        left = steps - step if max_tokens is None else (max_tokens - seen) // batch_tokens
        needed = left if following is None else -(-max(0, following - seen) // batch_tokens)
        count = min(left, needed)
        if count > 0:
            stages.append((step, seen, batch_tokens))
            step, seen = step + count, seen + count * batch_tokens
        if needed > left:  # the run ends here
            break
    return BatchRamp(tuple(stages), step)


def check_ramp(*, plan: BatchPlan, ramp: BatchRamp) -> None:
    """Raise ConfigError unless, in each stage, all micro-batches on all devices have the same number of windows."""
    unit = plan.context_length * plan.accumulation * plan.world_size
    for _, seen, batch_tokens in ramp.stages:
        if batch_tokens % unit or batch_tokens > plan.batch_tokens:
            below = batch_tokens // unit * unit
            near = " or ".join(str(v) for v in (below, below + unit) if 0 < v <= plan.batch_tokens)
            raise ConfigError(
                f"batch_schedule: {batch_tokens} tokens per update from {seen} tokens on: must be a multiple of "
                f"context_length {plan.context_length} x accumulation {plan.accumulation} x devices "
                f"{plan.world_size} = {unit}, up to batch_tokens={plan.batch_tokens}; try {near}, or a larger "
                "micro_batch_size"
            )
