"""Decides when checkpoints are saved, which ones are kept, and where `last` and `best` point."""

import logging
import math
import os
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from llm.callbacks.checkpoint_io import FolderCheckpointIO
from llm.distributed.lightning_private import validation_follows
from llm.errors import ConfigError
from llm.run_folder.background import BackgroundWriter
from llm.run_folder.checkpoint_files import list_checkpoints, point, remove_checkpoint, step_folder
from llm.run_folder.folder import RunFolder

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """A callback that saves checkpoints at regular updates, at the last update, and at the best validation loss.

    A checkpoint is saved between two updates. Where validation follows the same update, the checkpoint is saved after
    it, so that a resumed run does not validate again. A run that is being stopped saves first. A thread writes the
    files. If writing fails, the run stops at the next update. Training waits for the last checkpoint before it ends.

    Args:
        run_folder: the folder in which checkpoints are saved.
        checkpoint_every: optimizer updates between checkpoints, at least 1.
        keep: number of newest checkpoints that are not deleted, at least 2, because one may be corrupt. The best is not
            deleted either.
    """

    def __init__(self, *, run_folder: RunFolder, checkpoint_every: int, keep: int) -> None:
        if checkpoint_every < 1:
            raise ConfigError(f"checkpoint_every={checkpoint_every}: must be at least 1; try 200")
        if keep < 2:
            raise ConfigError(
                f"callbacks.checkpoints.keep={keep}: must be at least 2, because one may be corrupt; try 2"
            )
        self.run_folder = run_folder
        self.checkpoint_every, self.keep = checkpoint_every, keep
        self.best_loss = math.inf
        self._step = 0
        self._saved_step = -1
        self._is_deferred = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the best loss so far, unless the run resumes from an earlier update."""
        self._step = trainer.global_step
        self._saved_step = trainer.global_step or -1
        self._is_deferred = False
        summary = self.run_folder.read_summary()
        if summary.get("best_val_loss") is not None and summary.get("best_step", math.inf) <= trainer.global_step:
            self.best_loss = summary["best_val_loss"]

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save a checkpoint after an update for which one is due."""
        if trainer.global_step == self._step:
            return
        _writer(trainer).check()
        self._step = trainer.global_step
        is_last = trainer.should_stop or self._step == trainer.max_steps
        if is_last or self._step % self.checkpoint_every == 0:
            self._is_deferred = not is_last and validation_follows(trainer)
            if not self._is_deferred:
                self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the checkpoint that was due before validation, or the best one so far."""
        if trainer.sanity_checking or not trainer.fit_loop.epoch_loop.batch_progress.total.ready:
            return
        loss = float(trainer.callback_metrics.get("val/loss", math.inf))
        is_best = loss < self.best_loss
        if self._is_deferred or is_best:
            self._is_deferred = False
            self._save(trainer)
        if is_best:
            self.best_loss = loss
            self._point(trainer, "best")
            self.run_folder.update({"best_val_loss": loss, "best_step": trainer.global_step})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last update where the data ended early, and wait until the checkpoint is written."""
        if trainer.global_step:
            self._save(trainer)
        _writer(trainer).wait()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Wait for the checkpoint that is being written, unless the user stops the run at once."""
        if isinstance(exception, KeyboardInterrupt):
            _writer(trainer).abandon()
            return
        try:
            _writer(trainer).wait()
        except Exception as error:
            if error is not exception:
                log.error("the last checkpoint was not written: %s", error)

    def _save(self, trainer: L.Trainer) -> None:
        """Save this update's checkpoint once."""
        if self._saved_step == trainer.global_step:
            return
        trainer.save_checkpoint(step_folder(self.run_folder.checkpoints, trainer.global_step), weights_only=False)
        self._saved_step = trainer.global_step
        self._point(trainer, "last")

    def _point(self, trainer: L.Trainer, name: str) -> None:
        """Point `last` and `best` to this update's checkpoint once it exists, and delete old ones."""
        if trainer.is_global_zero:
            _writer(trainer).submit(partial(self._point_and_prune, name, trainer.global_step))

    def _point_and_prune(self, name: str, step: int) -> None:
        checkpoints = self.run_folder.checkpoints
        point(checkpoints / name, step_folder(checkpoints, step))
        best = checkpoints / "best"
        kept = os.readlink(best) if best.is_symlink() else None
        for _, folder in list_checkpoints(checkpoints)[: -self.keep]:
            if folder.name != kept:
                remove_checkpoint(folder)


def _writer(trainer: L.Trainer) -> BackgroundWriter:
    checkpoint_io = trainer.strategy.checkpoint_io
    assert isinstance(checkpoint_io, FolderCheckpointIO)
    return checkpoint_io.writer
