"""How tokens per update become micro-batches: the one place where accumulation is derived."""

from dataclasses import dataclass

from llm.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """An update of `batch_tokens` is accumulation x world_size x micro_batch_size windows of context_length."""

    batch_tokens: int
    context_length: int
    world_size: int
    micro_batch_size: int

    @property
    def windows(self) -> int:
        """Windows per update."""
        return self.batch_tokens // self.context_length

    @property
    def accumulation(self) -> int:
        """Micro-batches per update on each device."""
        return self.windows // (self.world_size * self.micro_batch_size)


def plan_batch(*, batch_tokens: int, context_length: int, world_size: int, micro_batch_size: int) -> BatchPlan:
    """Return the plan of an update.

    Raises:
        ConfigError: a value below 1, or batch_tokens that is not a whole number of micro-batches on every device; the
            nearest legal values are named.
    """
    values = {"batch_tokens": batch_tokens, "context_length": context_length, "micro_batch_size": micro_batch_size}
    for key, value in values.items():
        if value < 1:
            raise ConfigError(f"{key}={value}: must be at least 1; give a positive whole number")
    unit = context_length * world_size * micro_batch_size
    if batch_tokens % unit:
        below = batch_tokens // unit * unit
        near = " or ".join(str(v) for v in (below, below + unit) if v)
        raise ConfigError(
            f"batch_tokens={batch_tokens}: must be a multiple of context_length {context_length} x devices "
            f"{world_size} x micro_batch_size {micro_batch_size} = {unit}; try {near}"
        )
    return BatchPlan(batch_tokens, context_length, world_size, micro_batch_size)


def micro_batch_candidates(*, batch_tokens: int, context_length: int, world_size: int) -> list[int]:
    """Return the micro-batch sizes that divide an update, largest first.

    Raises:
        ConfigError: batch_tokens that is not a whole number of windows on every device.
    """
    windows = plan_batch(
        batch_tokens=batch_tokens, context_length=context_length, world_size=world_size, micro_batch_size=1
    ).accumulation
    return [n for n in range(windows, 0, -1) if windows % n == 0]


def total_steps(*, max_steps: int | None, max_tokens: int | None, batch_tokens: int) -> int:
    """Return the updates of the run.

    Raises:
        ConfigError: neither or both limits given, or one that allows no update.
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
