"""Whether all ranks still hold the same model: a checksum of every tensor, compared across ranks now and then."""

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from llm.distributed.zero.weights import is_sharded
from llm.errors import ConfigError, CrucibleError


class RanksDivergedError(CrucibleError):
    """Ranks that hold different weights or buffers: their averages mean nothing any more."""


class RankChecksum(Callback):
    """Compares weights, and buffers such as codebooks and balancing biases, over all ranks; stops a run that diverged.

    Every tensor's elements are summed as whole numbers of their bits, so that equal tensors give equal sums in any
    order and one changed bit changes the sum. Weights that a strategy holds in parts have no second copy to compare
    with: then buffers alone are. One pass over the weights and a message of 16 bytes a tensor; a run on one device
    does nothing.

    Args:
        every: updates between comparisons, at least 1.

    Raises:
        ConfigError: an `every` below 1.
        RanksDivergedError: a tensor differs, by name.
    """

    def __init__(self, *, every: int) -> None:
        if every < 1:
            raise ConfigError(f"callbacks.rank_checksum.every={every}: must be at least 1 update; try 100")
        self.every, self._step = every, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Begin with equal ranks."""
        self._step = trainer.global_step
        self._compare(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Compare after every so many updates."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._step % self.every == 0:
                self._compare(trainer, pl_module)

    @torch.no_grad()
    def _compare(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.world_size == 1:
            return
        held = {n: t for n, t in _tensors(pl_module).items() if t.numel() and not is_sharded(t)}
        if not held:  # all in parts, and no buffers
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
            f"{names[0]}; resume from a checkpoint, and look for what one rank alone does (a random draw, a condition)"
        )


def _tensors(pl_module: Any) -> dict[str, Tensor]:
    """Every parameter and every buffer that is kept."""
    return {name: tensor for name, tensor in pl_module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}


def checksum(tensor: Tensor) -> Tensor:
    """Sum the bits of a tensor, as whole numbers that wrap around."""
    bits = tensor.detach().contiguous().flatten().view(torch.uint8)
    for dtype in (torch.int32, torch.int16):
        if bits.numel() % dtype.itemsize == 0 and bits.data_ptr() % dtype.itemsize == 0:
            bits = bits.view(dtype)
            break
    return bits.sum(dtype=torch.int64)
