"""Measures tokens per second, and the share of the device's peak that they use."""

import time
from collections import deque
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback


class Throughput(Callback):
    """A callback that measures tokens per second over whole steps, including the loading of data.

    The first update of a process is excluded, because it compiles and allocates. Validation and checkpointing are
    excluded too, with the data fetch after them.

        tokens_per_second = tokens of the last `window` updates / their seconds
        mfu = tokens_per_second · flops_per_token / (peak_flops · devices)

    Args:
        peak_flops: dense FLOPs per second of one device in the precision of the run; None where it is unknown, so that
            no mfu is reported.
        window: number of last updates that the running figure covers, at least 1.
    """

    def __init__(self, *, peak_flops: float | None, window: int) -> None:
        self.peak_flops = peak_flops
        self._recent: deque[tuple[int, float]] = deque(maxlen=window)
        self._tokens, self._seconds = 0, 0.0
        self._since: float | None = None
        self._step = 0
        self._partial = 0.0
        self._is_first = True

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second over the last updates; None before the second update."""
        seconds = sum(seconds for _, seconds in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds else None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Reset the counters of an earlier run."""
        self._recent.clear()
        self._step, self._since, self._partial, self._is_first = trainer.global_step, None, 0.0, True

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock if it is stopped."""
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Add the time of this micro-step; at the end of an update, add its tokens."""
        self._lap()
        self._since = time.perf_counter()
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._is_first:
            _wait(pl_module)
            self._is_first, self._since = False, time.perf_counter()
        else:
            tokens = pl_module.batch_tokens_at(self._step - 1)
            self._recent.append((tokens, self._partial))
            self._tokens, self._seconds = self._tokens + tokens, self._seconds + self._partial
        self._partial = 0.0

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Synchronize with the device and stop the clock."""
        self._pause(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Synchronize with the device and stop the clock."""
        self._pause(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return tokens and seconds so far, so that the total spans resumed runs."""
        return {"tokens": self._tokens, "seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the totals of a checkpoint."""
        self._tokens, self._seconds = state_dict["tokens"], state_dict["seconds"]

    def step_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        """Return the running figures for the recorder."""
        speed = self.tokens_per_second
        if speed is None:
            return {}
        mfu = self._mfu(speed, trainer, pl_module)
        figures = {"tokens_per_second": speed, "training_seconds": self._seconds}
        return figures | ({} if mfu is None else {"mfu": mfu})

    def final_figures(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        """Return the total figures for the summary; where the peak is unknown, mfu is "n/a"."""
        speed = self._tokens / self._seconds if self._seconds else None
        mfu = None if speed is None else self._mfu(speed, trainer, pl_module)
        return {
            "tokens_per_second": speed,
            "tokens_per_second_recent": self.tokens_per_second,
            "training_seconds": self._seconds,
            "mfu": "n/a" if self.peak_flops is None else mfu,
        }

    def _mfu(self, speed: float, trainer: L.Trainer, pl_module: Any) -> float | None:
        if self.peak_flops is None:
            return None
        return speed * pl_module.flops_per_token / (self.peak_flops * trainer.world_size)

    def _lap(self) -> None:
        if self._since is not None:
            self._partial += time.perf_counter() - self._since
            self._since = None

    def _pause(self, pl_module: Any) -> None:
        if self._since is not None:
            _wait(pl_module)
            if self._recent and not self._is_first:
                # pending work of the device belongs to the update just counted
                rest = time.perf_counter() - self._since
                tokens, seconds = self._recent[-1]
                self._recent[-1] = (tokens, seconds + rest)
                self._seconds += rest
            self._since = None


def _wait(pl_module: Any) -> None:
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)
