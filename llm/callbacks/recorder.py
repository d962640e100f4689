"""Writes one line of metrics per update to metrics.jsonl and to each logger, without synchronizing with the GPU."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from llm.contracts import StepReporter, ValidationReporter
from llm.errors import ConfigError
from llm.run_folder.folder import RunFolder


class Recorder(Callback):
    """A callback that collects the metrics of an update and writes them one update later.

    Metrics come from `pl_module.step_metrics` and from each callback that is a `StepReporter`. Metrics of a validation
    are added to the line of their update. Numbers stay tensors until the next update, when the device has computed
    them. The line is written before a checkpoint, so a kill loses no line of an update that a checkpoint contains.

    Args:
        run_folder: the folder of metrics.jsonl.
        log_every: optimizer updates between lines, at least 1. The first update and each validation have a line too.
    """

    def __init__(self, *, run_folder: RunFolder, log_every: int) -> None:
        if log_every < 1:
            raise ConfigError(f"callbacks.recorder.log_every={log_every}: must be at least 1; try 10")
        self.run_folder, self.log_every = run_folder, log_every
        self._step = 0
        self._first = True
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._last: tuple[int, dict[str, float]] | None = None
        self._reporters: list[StepReporter] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start counting at the update from which the run starts or resumes."""
        self._step, self._first, self._pending, self._last = trainer.global_step, True, None, None
        self._reporters = [c for c in trainer.callbacks if isinstance(c, StepReporter)]  # pyright: ignore[reportAttributeAccessIssue]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Collect this update's metrics when they are due, after writing those of the previous one."""
        if trainer.global_step == self._step:
            return
        self._flush(trainer)
        self._step = trainer.global_step
        if self._first or self._step % self.log_every == 0 or self._step == trainer.max_steps:
            self._first = False
            self._pending = (self._step, self._collect(trainer, pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Add validation's metrics to the line of its update."""
        if trainer.sanity_checking:
            return
        if self._pending is None:
            self._pending = (trainer.global_step, self._collect(trainer, pl_module))
        validation = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self._pending[1].update(validation)
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, ValidationReporter):
                self._pending[1].update(callback.validation_metrics(trainer))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the line before the checkpoint, because a run resumed from it does not write it again."""
        self._flush(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the last line."""
        self._flush(trainer)
        self._log_last(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write the line of the last update that succeeded."""
        self._flush(trainer)
        self._log_last(trainer)

    def _collect(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        metrics: dict[str, Any] = {"tokens_seen": pl_module.tokens_seen(trainer.global_step)}
        metrics.update(pl_module.step_metrics)
        for callback in self._reporters:
            metrics.update(callback.step_metrics(trainer, pl_module))
        return metrics

    def _flush(self, trainer: L.Trainer) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        numbers = {name: _number(value) for name, value in metrics.items()}
        self.run_folder.append_metrics(step, numbers)
        scalars = {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}
        if (
            trainer.should_stop or step == trainer.max_steps
        ):  # the checkpoint is saved before validation: log both together
            self._last = (step, {**(self._last[1] if self._last else {}), **scalars})
        else:
            _log(trainer, step, scalars)

    def _log_last(self, trainer: L.Trainer) -> None:
        """Log the metrics of the last update once."""
        last, self._last = self._last, None
        if last is not None:
            _log(trainer, *last)


def _log(trainer: L.Trainer, step: int, scalars: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=step)


def _number(value: Any) -> Any:
    """Return a tensor as a number, or as a list where it has several."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.detach().to(torch.float32).tolist()
    return value
