"""Shows progress: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from llm.contracts import SpeedReporter
from llm.errors import ConfigError

FIGURES_OF_LOSS = ("val/loss", "val/perplexity", "val/bits_per_byte")
"""Figures of validation that are bounds where the loss is one."""

STANDARD_ERROR = "val/loss_standard_error"
"""The figure of validation that only bounds have."""

log = logging.getLogger(__name__)


class ProgressLine(ProgressBar):
    """A callback that shows step, loss, tokens per second and remaining time; results of validation get their own
    lines.

    Args:
        every: optimizer updates between plain lines where there is no terminal, at least 1.
        refresh_seconds: seconds between redraws of the bar, so that drawing costs nothing.
    """

    def __init__(self, *, every: int, refresh_seconds: float) -> None:
        super().__init__()
        if every < 1:
            raise ConfigError(f"callbacks.progress.every={every}: must be at least 1; try 50")
        self.every, self.refresh_seconds = every, refresh_seconds
        self._is_enabled = True
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._streams: list[tuple[Any, Any]] = []
        self._drawn_at = 0.0
        self._step = 0
        self._start: tuple[float, int] = (0.0, 0)
        self._loss: Any = None
        self._shown_loss = "–"

    def disable(self) -> None:
        """Show nothing. Lightning calls this on every rank except the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self._is_enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Open the bar where standard output is a terminal."""
        self._step = trainer.global_step
        self._start = (time.monotonic(), trainer.global_step)
        if self._is_enabled and sys.stdout is not None and sys.stdout.isatty():  # None where it is closed
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=16),  # the other columns need the rest of 80
                TextColumn("{task.fields[loss]}  {task.fields[speed]}  {task.fields[left]}"),
                console=Console(file=sys.stdout),
                auto_refresh=False,
            )
            self._task = self._bar.add_task(
                "", total=trainer.max_steps, completed=self._step, loss="", speed="", left=""
            )
            self._bar.start()
            self._streams = list(_redirected())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Redraw, or log a line, when it is time."""
        if not self._is_enabled or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        previous, self._loss = self._loss, pl_module.step_metrics.get("train/loss")
        now = time.monotonic()
        if self._bar is not None and now - self._drawn_at >= self.refresh_seconds:
            self._drawn_at = now
            # the loss of the previous update, which is known without synchronizing with the device
            self._shown_loss = self._shown_loss if previous is None else f"{float(previous):.4f}"
            self._draw(trainer)
        elif self._bar is None and (self._step % self.every == 0 or self._step == trainer.max_steps):
            loss = "" if self._loss is None else f"  loss {float(self._loss):.4f}"
            log.info("step %d/%d%s  %s  %s", self._step, trainer.max_steps, loss, *self._speed_and_left(trainer))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log validation's result."""
        if not self._is_enabled or trainer.sanity_checking:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if metrics:
            bounds = FIGURES_OF_LOSS if STANDARD_ERROR in metrics else ()
            shown = (f"{name} {'<= ' if name in bounds else ''}{value:.4f}" for name, value in metrics.items())
            log.info("step %d  %s", trainer.global_step, "  ".join(shown))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Close the bar and keep its last state on the terminal."""
        if self._bar is not None and self._loss is not None:
            self._shown_loss = f"{float(self._loss):.4f}"
            self._draw(trainer)
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the bar after an error."""
        self._close()

    def _draw(self, trainer: L.Trainer) -> None:
        assert self._bar is not None
        speed, left = self._speed_and_left(trainer)
        self._bar.update(
            self._task, completed=trainer.global_step, loss=f"loss {self._shown_loss}", speed=speed, left=left
        )
        self._bar.refresh()

    def _speed_and_left(self, trainer: L.Trainer) -> tuple[str, str]:
        callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        speeds = (callback.tokens_per_second for callback in callbacks if isinstance(callback, SpeedReporter))
        speed = next((speed for speed in speeds if speed), None)
        began, first = self._start
        seconds_a_step = (time.monotonic() - began) / max(1, trainer.global_step - first)
        left = max(0, trainer.max_steps - trainer.global_step) * seconds_a_step
        return f"{speed:,.0f} tokens/s" if speed else "", f"{_clock(left)} left"

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams = []


def _redirected() -> Iterator[tuple[Any, Any]]:
    """Write log lines through the bar's replacement of standard output, so that they appear above the bar."""
    for handler in logging.getLogger().handlers:
        if not isinstance(handler, logging.StreamHandler) or isinstance(handler, logging.FileHandler):
            continue
        if getattr(handler.stream, "closed", False):  # a stream that an earlier handler closed
            continue
        if getattr(handler.stream, "isatty", bool)():
            with contextlib.suppress(ValueError):
                yield handler, handler.setStream(sys.stdout)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
