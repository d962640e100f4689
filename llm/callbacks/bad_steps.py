"""Records refused updates and their windows in bad_steps.jsonl."""

import json
import logging
import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from llm.contracts import UpdateRefuser, WindowIndexer
from llm.run_folder.folder import RunFolder
from llm.run_folder.rollback import read_rollbacks

log = logging.getLogger(__name__)

FILE = "bad_steps.jsonl"


class BadSteps(Callback):
    """A callback that records each update that was not applied, with the losses, windows and documents of its batch.

    One line per update has step, why, loss and grad_norm. For each micro-batch of each rank it has the loss and the
    numbers of its windows, with the first and last document of the corpus in each window. `python -m llm.replay`
    computes its losses again, window by window. After a rollback, the metrics of each step include `rollbacks`, the
    number of rollbacks.

    Args:
        run_folder: the folder in which bad_steps.jsonl is written.
    """

    def __init__(self, *, run_folder: RunFolder) -> None:
        self.run_folder, self._rollbacks = run_folder, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Count the rollbacks of the run."""
        self._rollbacks = len(read_rollbacks(self.run_folder))

    def step_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        """Return the number of rollbacks, if there were any."""
        return {"rollbacks": float(self._rollbacks)} if self._rollbacks else {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Record an update that was skipped."""
        self._note(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Record the update that stopped the run."""
        self._note(trainer, pl_module)

    def _note(self, trainer: L.Trainer, pl_module: Any) -> None:
        refused = pl_module.take_refused() if isinstance(pl_module, UpdateRefuser) else None
        if refused is None or not self.run_folder.is_writer:
            return
        losses = refused.pop("losses")
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        parts = []
        if isinstance(data, WindowIndexer):
            parts = _micro_batches(losses, data.windows_of_step(refused["step"] - 1), data.documents_in)
        line = {key: _number(value) for key, value in refused.items()} | {"micro_batches": parts}
        self.run_folder.append_text(FILE, json.dumps(line) + "\n")
        log.warning(
            "step %d was refused (%s): recorded in %s; inspect it with python -m llm.replay run_dir=%s step=%d",
            refused["step"], refused["why"], FILE, self.run_folder.path, refused["step"],
        )  # fmt: skip


def _micro_batches(losses: list[list[float]], windows: list[int], documents_in: Any) -> list[dict[str, Any]]:
    """Return loss, windows and documents of each rank in each micro-step, in the order of the sampler."""
    ranks, steps = len(losses), len(losses[0])
    rows = len(windows) // (ranks * steps)
    documents = dict(zip(windows, documents_in(windows), strict=True))
    parts = []
    for micro_step in range(steps):
        for rank in range(ranks):
            first = (micro_step * ranks + rank) * rows
            own = windows[first : first + rows]
            part = {"rank": rank, "micro_step": micro_step, "loss": _number(losses[rank][micro_step])}
            parts.append(part | {"windows": own, "documents": [documents[window] for window in own]})
    return parts


def _number(value: Any) -> Any:
    """Return a number that JSON cannot represent as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
