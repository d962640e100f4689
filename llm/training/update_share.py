"""Counts the micro-batches of an update, which the loss and the noise of each of them depend on."""

from typing import Any

import torch

from llm.contracts import Batch, LabelCounter, LossShare
from llm.ops.noise import KeyedNoise


class UpdateShares:
    """The place of each micro-batch in its update: its share of the labels, and its noise.

    Row i of micro-step a on rank r of R is row (a R + r) b + i of the update, where b is the size of a micro-batch, as
    in the sampler of the windows. Noise therefore does not depend on micro-batches and ranks.

    Args:
        seed: seed of the noise.
        with_last: whether the last label of a window has a loss.
    """

    def __init__(self, *, seed: int, with_last: bool) -> None:
        self.seed, self.with_last = seed, with_last
        self._step, self._micro_step, self._num_labels = -1, 0, None

    def of_micro_batch(self, batch: Batch, *, trainer: Any) -> tuple[LossShare, KeyedNoise]:
        """Return the share and the noise of the next micro-batch; labels are counted once per update."""
        if trainer.global_step == self._step:
            self._micro_step += 1
        else:
            data = trainer.datamodule
            is_counted = isinstance(data, LabelCounter)
            step = trainer.global_step
            self._num_labels = data.labels_of_step(step, with_last=self.with_last) if is_counted else None
            self._step, self._micro_step = step, 0
        ids = batch["input_ids"]
        first = (self._micro_step * trainer.world_size + trainer.global_rank) * len(ids)
        rows = first + torch.arange(len(ids), device=ids.device)
        share = LossShare(self._num_labels, trainer.accumulate_grad_batches * trainer.world_size)
        return share, KeyedNoise(self.seed, self._step, rows)
