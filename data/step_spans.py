"""Computes which windows of a run belong to an update, also where updates differ in size."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from llm.errors import ConfigError


@runtime_checkable
class TokenRamp(Protocol):
    """A schedule of updates that differ in size."""

    def batch_tokens_at(self, step: int) -> int:
        """Return the tokens of the update that follows `step` updates."""
        ...

    def tokens_seen(self, step: int) -> int:
        """Return the tokens of the first `step` updates."""
        ...


@dataclass(frozen=True)
class StepSpans:
    """The place of each update among the windows of a run.

    Args:
        batch_tokens: tokens per update, over all devices.
        context_length: tokens per window.
        ramp: sizes of the updates where they differ, or None.
    """

    batch_tokens: int
    context_length: int
    ramp: TokenRamp | None

    @property
    def windows_per_step(self) -> int:
        """Windows per update; raise ConfigError where batch_tokens is no multiple of context_length."""
        if self.batch_tokens % self.context_length:
            nearest = max(round(self.batch_tokens / self.context_length), 1) * self.context_length
            raise ConfigError(
                f"batch_tokens={self.batch_tokens}: must be a multiple of context_length={self.context_length}; "
                f"try {nearest}"
            )
        return self.batch_tokens // self.context_length

    def span(self, step: int) -> tuple[int, int]:
        """Return the place of the first window of the update that follows `step` updates, and how many it has."""
        if self.ramp is None:
            return step * self.windows_per_step, self.windows_per_step
        tokens = self.ramp.tokens_seen(step), self.ramp.batch_tokens_at(step)
        return tokens[0] // self.context_length, tokens[1] // self.context_length
