"""The errors a user can cause; each message reads `<key>=<value>: <rule broken>; <what to do>`."""

import difflib
from collections.abc import Iterable


class CrucibleError(Exception):
    """Base of every error below: entry points print its message alone, without a traceback."""


class ConfigError(CrucibleError):
    """A setting that cannot be honoured, found before any expensive work."""


class ShapeError(CrucibleError):
    """A tensor whose shape a piece cannot work with."""


class DataError(CrucibleError):
    """Text or tokens that are missing, broken, or too few."""


class CheckpointError(CrucibleError):
    """A checkpoint that is missing, corrupt, or of another architecture."""


class NonFiniteError(CrucibleError):
    """A loss or gradient that is not finite, met before it could be applied."""


class OutOfMemoryError(CrucibleError):
    """A device or a host without room for what a step needs."""


class LimitError(CrucibleError):
    """A limit of the operating system that the run reached, or a process that was killed from outside."""


class SpikeError(CrucibleError):
    """An update that is not applied and asks for a return to the last good checkpoint.

    Args:
        step: updates done before it.
        why: what is wrong with it.
    """

    def __init__(self, step: int, why: str) -> None:
        super().__init__(f"step {step + 1}: {why}")
        self.step, self.why = step, why


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return `"; did you mean x?"` for the candidate closest to `name`, or `""` when none is close."""
    found = closest(name, candidates)
    return f"; did you mean {found}?" if found else ""


def closest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate closest to `name` in spelling, None when none is close."""
    return next(iter(difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)), None)
