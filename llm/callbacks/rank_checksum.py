"""Checks at regular updates that all ranks have the same model, by a checksum of every tensor."""

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from llm.distributed.zero.weights import is_sharded
from llm.errors import ConfigError, CrucibleError


class RanksDivergedError(CrucibleError):
    """Ranks that have different weights or buffers, so that averages over ranks are meaningless."""


class RankChecksum(Callback):
    """A callback that compares weights and buffers over all ranks, and stops a run whose ranks differ.

    Buffers are for example codebooks and balancing biases. The bits of a tensor's elements are summed as integers.
    Equal tensors then give equal sums in any order, and one changed bit changes the sum. Sharded weights have no second
    copy, so only buffers are compared. A comparison reads the weights once and sends 16 bytes per tensor. On one device
    nothing is done.

    Args:
        every: updates between comparisons, at least 1.

    Raises:
        ConfigError: an `every` below 1.
        RanksDivergedError: a tensor differs; the message names it.
    """

    def __init__(self, *, every: int) -> None:
        if every < 1:
            raise ConfigError(f"callbacks.rank_checksum.every={every}: must be at least 1 update; try 100")
        self.every, self._step = every, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compare before the first update."""
        self._step = trainer.global_step
        self._compare(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Compare when it is due."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._step % self.every == 0:
                self._compare(trainer, pl_module)

    @torch.no_grad()
    def _compare(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.world_size == 1:
            return
        held = {n: t for n, t in _tensors(pl_module).items() if t.numel() and not is_sharded(t)}
        if not held:  # all weights are sharded, and there are no buffers
            return
        sums = torch.stack([checksum(tensor) for tensor in held.values()])
        lowest, highest = sums.clone(), sums.clone()
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        if torch.equal(lowest, highest):
            return
        names = [name for name, differs in zip(held, (lowest != highest).tolist(), strict=True) if differs]
        raise RanksDivergedError(
            f"callbacks.rank_checksum: ranks differ at step {trainer.global_step} in {len(names)} tensors, first "
            f"{names[0]}; resume from a checkpoint, and find the code that acts on one rank alone (a random draw, a "
            "condition)"
        )


def _tensors(pl_module: Any) -> dict[str, Tensor]:
    """Return every parameter and every buffer of the state dict."""
    return {name: tensor for name, tensor in pl_module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}


def checksum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits as integers that wrap around."""
    bits = tensor.detach().contiguous().flatten().view(torch.uint8)
    for dtype in (torch.int32, torch.int16):
        if bits.numel() % dtype.itemsize == 0 and bits.data_ptr() % dtype.itemsize == 0:
            bits = bits.view(dtype)
            break
    return bits.sum(dtype=torch.int64)
