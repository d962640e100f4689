"""Decides whether an update is applied: its loss and gradient must be finite and must not jump."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llm.errors import CrucibleError, NonFiniteError, SpikeError
from llm.training.spikes import SpikeGuard

NonFinitePolicy = Literal["raise", "skip", "tiger"]

MAX_NONFINITE_IN_A_ROW = 10
"""Consecutive updates without a finite loss and gradient after which `on_nonfinite=skip` and `tiger` stop the run."""

COUNTERS = ("spiked_steps", "nonfinite_steps", "nonfinite_in_a_row", "nonfinite_step")
"""Counters that a checkpoint stores and a resumed run restores."""


@dataclass(frozen=True)
class UpdateVerdict:
    """The decision about one update.

    Args:
        reason: why the update is refused; empty where it is accepted.
        is_dropped: whether its gradients are discarded, so that no state changes.
        error: what stops the run, if anything.
        counts: counters to log with the update.
    """

    reason: str = ""
    is_dropped: bool = False
    error: CrucibleError | None = None
    counts: Mapping[str, float] | None = None


class StepGuard:
    """Judges each update before it is applied, by the policies `on_nonfinite` and `spikes`.

    Args:
        on_nonfinite: what to do with a loss or gradient that is not finite: stop (`raise`), discard the update
            (`skip`), or leave it to Tiger, which shrinks the affected tensors (`tiger`). The last two stop the run
            after MAX_NONFINITE_IN_A_ROW such updates in a row.
        spikes: judges finite updates; None accepts all of them.
    """

    def __init__(self, *, on_nonfinite: NonFinitePolicy, spikes: SpikeGuard | None) -> None:
        self.on_nonfinite, self.spikes = on_nonfinite, spikes
        self.spiked_steps, self.nonfinite_steps, self.nonfinite_in_a_row, self.nonfinite_step = 0, 0, 0, -1

    def judge(self, step: int, *, loss: Tensor, norm: Tensor) -> UpdateVerdict:
        """Return the decision about the update that follows `step` updates.

        Args:
            step: number of updates before this one.
            loss: training loss of the update, averaged over micro-batches and ranks.
            norm: 2-norm of the whole gradient before clipping.
        """
        if not bool(torch.isfinite(norm + loss)):
            return self._judge_nonfinite(step, float(loss), float(norm))
        if self.spikes is None or not (reason := self.spikes.judge(float(loss), float(norm))):
            return UpdateVerdict()
        if self.spikes.goes_back:
            return UpdateVerdict(reason, error=SpikeError(step, reason))
        self.spiked_steps += 1
        return UpdateVerdict(reason, is_dropped=True, counts={"spiked_steps": float(self.spiked_steps)})

    def _judge_nonfinite(self, step: int, loss: float, norm: float) -> UpdateVerdict:
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if self.nonfinite_step == step - 1 else 1
        self.nonfinite_step = step
        self.nonfinite_steps += 1
        return UpdateVerdict(
            "not finite",
            is_dropped=self.on_nonfinite == "skip",
            error=self._error_of_nonfinite(step, loss, norm),
            counts={"nonfinite_steps": float(self.nonfinite_steps)},
        )

    def _error_of_nonfinite(self, step: int, loss: float, norm: float) -> CrucibleError | None:
        is_last = self.nonfinite_in_a_row >= MAX_NONFINITE_IN_A_ROW
        if self.on_nonfinite != "raise" and not is_last:
            return None
        if self.spikes is not None and self.spikes.goes_back:
            return SpikeError(step, f"loss={loss} grad_norm={norm} is not finite")
        where = f"loss={loss} grad_norm={norm} at step {step + 1}"
        if self.on_nonfinite == "raise":
            return NonFiniteError(
                f"{where}: not finite, and nothing was updated; lower optimizer.lr, lengthen schedule.warmup, or skip "
                "such steps with on_nonfinite=skip"
            )
        return NonFiniteError(
            f"{where}: the {MAX_NONFINITE_IN_A_ROW}th step in a row that is not finite; lower optimizer.lr, or "
            "continue from an earlier checkpoint with resume"
        )

    def save_to(self, checkpoint: dict[str, Any]) -> None:
        """Store the spike detector's state and the counters in a checkpoint."""
        if self.spikes is not None:
            checkpoint["spikes"] = self.spikes.state_dict()
        checkpoint["refused"] = {name: getattr(self, name) for name in COUNTERS}

    def load_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore what `save_to` stored; a checkpoint without it leaves everything at its start."""
        if self.spikes is not None and "spikes" in checkpoint:
            self.spikes.load_state_dict(checkpoint["spikes"])
        for name, value in checkpoint.get("refused", {}).items():
            if name in COUNTERS:
                setattr(self, name, value)
