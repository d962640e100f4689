"""Measures and clips the sharded gradients of ZeRO between the backward pass and the update."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.optim.shard import ShardLayout

OVERFLOW = -1.0
"""The norm by which DeepSpeed's engine knows gradients that are not finite: it then drops them and makes no update."""


class ShardedGradients:
    """Measures, clips and drops the averaged, accumulated gradients of a ZeRO engine, before any update rule.

    The engine would measure them a second time to clip and to look for overflow; it is told the answer instead.

    Args:
        zero: DeepSpeed's ZeRO optimizer, of stage 1, 2 or 3.
        layouts: of its shards.
    """

    def __init__(self, zero: Any, layouts: list[ShardLayout]) -> None:
        self.zero, self.layouts = zero, layouts
        self._is_dropped = False
        self._checks_overflow = getattr(zero, "check_grad_overflow", False)
        if hasattr(zero, "scaled_global_norm"):
            zero.scaled_global_norm = self._engine_norm
        else:
            zero._get_norm_groups = lambda: [self._engine_norm()]

    @property
    def exist(self) -> bool:
        """Whether any gradient exists."""
        return True

    def norm(self) -> Tensor:
        """2-norm of the whole gradient, over all tensors and ranks."""
        self._is_dropped = False
        totals = {}
        for index, layout in enumerate(self.layouts):
            squares = [torch.linalg.vector_norm(part.float()).double().square() for part in self._parts(index)]
            total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
            totals[index] = layout.all_reduce(total, dist.ReduceOp.SUM)
        return torch.stack(list(totals.values())).sum().sqrt().float()

    def squares_of(self, names: set[str]) -> Tensor:
        """Sum of squares of the gradients of some parameters, over all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self.layouts[0].comm_device)
        for index, layout in enumerate(self.layouts):
            held = zip(layout.slices, self._parts(index), strict=False)
            if len(parts := self._parts(index)) == 1 and parts[0].numel() == layout.flat.numel():
                held = ((piece, piece.of(parts[0].flatten())) for piece in layout.slices)
            for piece, part in held:
                if piece.name in names and piece.numel:
                    total += torch.linalg.vector_norm(part.float()).double().square().to(total.device)
        return self.layouts[0].all_reduce(total, dist.ReduceOp.SUM).float()

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale the gradients so that their norm is at most `max_norm`, as `torch.nn.utils` does."""
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for index in range(len(self.layouts)):
            for part in self._parts(index):
                part.mul_(factor.to(part.device))

    def drop(self) -> None:
        """Make the next step discard the gradients, so that it updates nothing."""
        self._is_dropped = True
        if hasattr(self.zero, "check_grad_overflow"):
            self.zero.check_grad_overflow = True

    def after_step(self) -> None:
        """Reset the decisions about the last step."""
        self._is_dropped = False
        if hasattr(self.zero, "check_grad_overflow"):
            self.zero.check_grad_overflow = self._checks_overflow

    def _parts(self, index: int) -> list[Tensor]:
        """This rank's gradients of one shard."""
        if getattr(self.zero, "cpu_offload", False) or getattr(self.zero, "offload_optimizer", False):
            wait = getattr(self.zero, "_wait_for_offload_copies", None)
            if wait is not None:
                wait()
            gradient = self.layouts[index].flat.grad
            return [] if gradient is None else [gradient]
        return list(self.zero.averaged_gradients[index])

    def _engine_norm(self) -> Tensor:
        device = self.layouts[0].comm_device
        return torch.tensor(OVERFLOW if self._is_dropped else 0.0, device=device)
