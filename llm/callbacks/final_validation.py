"""Validates at the end of a run, whatever its number of updates."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class FinalValidation(Callback):
    """A callback that validates after the last update also where `max_steps` is no multiple of `val_every`."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Ask the trainer to stop at its last update, because it then validates first, which it does not do at
        `max_steps`.
        """
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True
