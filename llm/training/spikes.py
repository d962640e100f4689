"""Detects updates whose loss or gradient norm jumps, which are skipped or rolled back."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

from llm.errors import ConfigError


class SpikeGuard:
    """A detector of spikes: updates whose loss or gradient norm is far above that of the last updates.

        refuse  x  where  x > mean + sigma std,  over the last `window` accepted updates, x = loss, then gradient norm

    After `max_in_a_row` refused updates, the next one is accepted and the statistics start anew, because the level of
    the loss itself has changed.

    Args:
        sigma: standard deviations above the mean, > 0.
        window: number of accepted updates for mean and deviation, at least 2. No update is refused before that many.
        max_in_a_row: number of consecutive updates that may be refused, at least 1.

    Raises:
        ConfigError: a value out of its range.
    """

    goes_back: ClassVar[bool] = False
    """Whether an update that is refused sends the run back to a checkpoint."""

    def __init__(self, *, sigma: float, window: int, max_in_a_row: int) -> None:
        for key, value, least in (("window", window, 2), ("max_in_a_row", max_in_a_row, 1)):
            if value < least:
                raise ConfigError(f"spikes.{key}={value}: must be at least {least}; try {64 * least}")
        if not 0 < sigma < math.inf:
            raise ConfigError(f"spikes.sigma={sigma}: must be above 0 standard deviations; try 6")
        self.sigma, self.window, self.max_in_a_row = sigma, window, max_in_a_row
        self.accepted: deque[tuple[float, float]] = deque(maxlen=window)
        self.in_a_row = 0

    def judge(self, loss: float, norm: float) -> str:
        """Return the reason why an update is a spike, or `""` and record it if it is none."""
        reason = self._reason(loss, norm)
        if reason and self.in_a_row < self.max_in_a_row:
            self.in_a_row += 1
            return reason
        if reason:
            self.accepted.clear()
        self.in_a_row = 0
        self.accepted.append((loss, norm))
        return ""

    def _reason(self, loss: float, norm: float) -> str:
        if len(self.accepted) < self.window:
            return ""
        for name, value, before in zip(
            ("loss", "grad_norm"), (loss, norm), zip(*self.accepted, strict=True), strict=True
        ):
            mean = math.fsum(before) / len(before)
            std = math.sqrt(math.fsum((x - mean) ** 2 for x in before) / (len(before) - 1))
            if value > mean + self.sigma * std:
                return f"{name}={value:.4g} is over {self.sigma:g} sigma above {mean:.4g}, sigma={std:.2g}"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Return the state with which a resumed run decides as an uninterrupted one."""
        return {"accepted": [list(pair) for pair in self.accepted], "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.accepted = deque(((loss, norm) for loss, norm in state["accepted"]), maxlen=self.window)
        self.in_a_row = state["in_a_row"]


class RollbackGuard(SpikeGuard):
    """A spike detector that rolls the run back to its newest valid checkpoint and excludes the windows read since then.

    It refuses the updates that `SpikeGuard` refuses, and those whose loss or gradient is not finite and would stop the
    run. The windows of all updates after the checkpoint up to the spike are excluded from then on, because a spike is
    seldom caused by its own windows alone.

    Args:
        sigma: standard deviations above the mean, > 0.
        window: accepted updates that mean and deviation are taken over, at least 2; none is refused before so many.
        past: number of updates after the spike whose windows are excluded too, at least 0.
        max_rollbacks: rollbacks per run, at least 1; the run stops where it would need one more.

    Raises:
        ConfigError: a value out of its range.

    Source: Chowdhery et al., "PaLM", arXiv:2204.02311, section 5.1.
    Differs: the paper skips 200 to 500 batches around the spike by hand, from a checkpoint about 100 steps before.
    """

    goes_back: ClassVar[bool] = True

    def __init__(self, *, sigma: float, window: int, past: int, max_rollbacks: int) -> None:
        super().__init__(sigma=sigma, window=window, max_in_a_row=1)
        if past < 0:
            raise ConfigError(f"spikes.past={past}: must be at least 0 updates; try 0")
        if max_rollbacks < 1:
            raise ConfigError(f"spikes.max_rollbacks={max_rollbacks}: must be at least 1; try 10, or spikes=none")
        self.past, self.max_rollbacks = past, max_rollbacks

    def judge(self, loss: float, norm: float) -> str:
        """Return the reason why an update is a spike, or `""` and record it if it is none."""
        reason = self._reason(loss, norm)
        if not reason:
            self.accepted.append((loss, norm))
        return reason
