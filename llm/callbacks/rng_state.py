"""Saves and restores random states, so that a resumed run draws the numbers of an uninterrupted one."""

import logging
import random
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

log = logging.getLogger(__name__)


class RngState(Callback):
    """A callback that saves and restores the random states of Python, NumPy, torch and the GPU on each rank.

    Validation and sampling do not change them, so their frequency does not affect training. Numbers that loggers and
    loaders draw before the first batch do not change them either.
    """

    def __init__(self) -> None:
        self._at_start: dict[str, Any] | None = get_rng_state()
        self._before: dict[str, Any] | None = None
        self._step = -1

    def on_train_batch_start(self, *_: Any) -> None:
        """Restore at the first batch, because building loggers and loaders draws random numbers."""
        if self._at_start is not None:
            set_rng_state(self._at_start)
            self._at_start = None

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save the states after each update, because a validation may follow."""
        if trainer.global_step != self._step:
            self._step, self._before = trainer.global_step, get_rng_state()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the states from before the validation."""
        if self._before is not None and not trainer.sanity_checking:
            set_rng_state(self._before)

    def state_dict(self) -> dict[str, Any]:
        """Return every rank's random states, as tensors and plain numbers."""
        if not (dist.is_available() and dist.is_initialized()):
            return {"ranks": [get_rng_state()]}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, get_rng_state())
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store this rank's states until training starts."""
        ranks = state_dict["ranks"]
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        if rank < len(ranks):
            self._at_start = ranks[rank]
        else:
            log.warning("the checkpoint has random states of %d ranks: rank %d starts from its seed", len(ranks), rank)


def get_rng_state() -> dict[str, Any]:
    """Return this process's random states as tensors and plain numbers, which load without running code."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the states of `get_rng_state`; without a GPU, the state of a GPU is ignored."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
