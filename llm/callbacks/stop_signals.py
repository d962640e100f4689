"""Ends a run between two updates, with a checkpoint, at Ctrl-C or a scheduler's SIGTERM."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from llm.distributed.launch import SAME_SIGNAL_SECONDS, STOPPING
from llm.distributed.lightning_private import take_sigterm, validation_follows


class StopSignals(Callback):
    """A callback that stops all ranks after the current update when one of them receives a signal.

    The checkpoint callback then saves. A second signal ends the run at once, without another checkpoint; earlier ones
    stay valid. Lightning's own handlers are replaced during training, because on SIGTERM they would stop inside an
    update and save nothing.

    Attributes:
        signal: the signal that stopped the run, or None; the process then exits with `128 + signal`.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._step = 0
        self._group: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the handlers; a SIGTERM that Lightning has already received counts."""
        self._step = trainer.global_step
        if trainer.world_size > 1:
            # ranks agree through the CPU, so that no update synchronizes with the device
            self._group = dist.new_group(backend="gloo")
        if take_sigterm(trainer):
            self._received = signal.SIGTERM
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in STOPPING}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop between two updates if any rank received a signal, and skip validation, because time may be short."""
        if trainer.global_step == self._step or self.signal is not None:
            return
        self._step = trainer.global_step
        number = self._agree()
        if number:
            self.signal = signal.Signals(number)
            if not validation_follows(trainer):
                trainer.limit_val_batches = 0
            trainer.should_stop = True

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the handlers; a second SIGINT counts as the signal that stopped the run."""
        if isinstance(exception, KeyboardInterrupt) and self.signal is None:
            self.signal = signal.SIGINT
        self._restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the handlers."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Store the signal; a handler may not do more safely."""
        if self._received is None:
            self._received, self._received_at = signal.Signals(number), time.monotonic()
            again = "press Ctrl-C again" if number == signal.SIGINT else "send it again"
            plan = "saving a checkpoint after this update, then stopping"
            text = f"\n{self._received.name}: {plan}; {again} to end at once\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())  # a logger may hold its lock now
        elif number == signal.SIGINT or time.monotonic() - self._received_at > SAME_SIGNAL_SECONDS:
            self.signal = signal.Signals(number)
            raise KeyboardInterrupt

    def _agree(self) -> int:
        """Return the highest signal number that any rank received, 0 for none."""
        number = int(self._received or 0)
        if self._group is None:
            return number
        highest = torch.tensor(number)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._group)
        return int(highest)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._note:  # Lightning may have restored its own already
                signal.signal(number, handler)
        self._previous = {}
