"""Ctrl-C, a scheduler's SIGTERM and their like: the run ends between two updates, with a checkpoint."""

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
    """Turns a signal to any rank into the same clean stop on all of them; the checkpoint callback then saves.

    A second signal ends the run at once, without another checkpoint; earlier ones stay valid. Lightning's own handlers
    are replaced meanwhile: on SIGTERM they would stop inside an update and save nothing.

    Attributes:
        signal: what stopped the run, None while nothing has; leave with `128 + signal`.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._step = 0
        self._group: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen from now on; a SIGTERM that Lightning has already noted counts."""
        self._step = trainer.global_step
        if trainer.world_size > 1:
            # the CPU agrees on its own, so that no update waits for the device to be done
            self._group = dist.new_group(backend="gloo")
        if take_sigterm(trainer):
            self._received = signal.SIGTERM
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in STOPPING}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Between two updates, stop if any rank was told to; skip validation, for the sender may not wait long."""
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
        """Stop listening; a second SIGINT counts as what stopped the run."""
        if isinstance(exception, KeyboardInterrupt) and self.signal is None:
            self.signal = signal.SIGINT
        self._restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop listening."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; only what is safe inside a handler happens here."""
        if self._received is None:
            self._received, self._received_at = signal.Signals(number), time.monotonic()
            again = "press Ctrl-C again" if number == signal.SIGINT else "send it again"
            plan = "saving a checkpoint after this update, then stopping"
            text = f"\n{self._received.name}: {plan}; {again} to end at once\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())  # a logger could be in the middle of a line
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
            if signal.getsignal(number) == self._note:  # Lightning may have put its own back already
                signal.signal(number, handler)
        self._previous = {}


def ignore_stop_signals(worker_id: int) -> None:
    """Make a data loader's worker outlive the signals that stop a run (pass it as `worker_init_fn`).

    Launchers signal the whole process group; a worker that died first would turn a clean stop into an error.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
