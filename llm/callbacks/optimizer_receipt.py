"""Writes optimizer.txt: the rule, rate and state of each tensor."""

import logging
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from llm.optim.receipt import receipt
from llm.run_folder.folder import RunFolder

log = logging.getLogger(__name__)


class OptimizerReceipt(Callback):
    """A callback that writes each tensor's kind, rule, rates and state bytes to optimizer.txt, and the totals to the
    log.

    The first lines show how the learning rate follows from the batch. The receipt describes the optimizer that the
    trainer steps, after a strategy has wrapped it.

    Args:
        run_folder: the folder in which optimizer.txt is written.
    """

    def __init__(self, *, run_folder: RunFolder) -> None:
        self.run_folder = run_folder

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the receipt before the first update."""
        text = "\n".join(
            [*pl_module.lr_derivation, "", receipt(trainer.optimizers[0], lr_scale=pl_module.peak_lr_scale)]
        )
        self.run_folder.save_text("optimizer.txt", text + "\n")
        if self.run_folder.is_writer:
            totals = text.rsplit("\n\n", 1)[-1]
            log.info("optimizer\n%s", "\n".join(f"  {line}" for line in totals.splitlines()))
