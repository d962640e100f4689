"""Measures and clips the sharded gradients of ZeRO between the backward pass and the update."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm.optim.shard import ShardLayout, Slice

OVERFLOW = -1.0
"""The norm with which DeepSpeed's engine marks gradients that are not finite, which it discards without an update."""


class ShardedGradients:
    """The averaged, accumulated gradients of a ZeRO engine, which are measured, clipped or dropped before the update
    rule.

    The engine would measure them again for clipping and for overflow, so it receives the result.

    Args:
        zero: DeepSpeed's ZeRO optimizer, of stage 1, 2 or 3.
        layouts: layouts of its shards.
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
        """Return the 2-norm of the whole gradient, over all tensors and ranks."""
        self._is_dropped = False
        totals = {}
        for index, layout in enumerate(self.layouts):
            squares = [torch.linalg.vector_norm(part.float()).double().square() for part in self._parts(index)]
            total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
            totals[index] = layout.all_reduce(total, dist.ReduceOp.SUM)
        return torch.stack(list(totals.values())).sum().sqrt().float()

    def squares_of(self, names: set[str]) -> Tensor:
        """Return the sum of squares of the gradients of some parameters, over all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self.layouts[0].comm_device)
        for index in range(len(self.layouts)):
            for piece, part in self._pieces(index):
                if piece.name in names:
                    total += torch.linalg.vector_norm(part.float()).double().square().to(total.device)
        return self.layouts[0].all_reduce(total, dist.ReduceOp.SUM).float()

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale the gradients so that their norm is at most `max_norm`, as `torch.nn.utils` does."""
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for index in range(len(self.layouts)):
            for part in self._parts(index):
                part.mul_(factor.to(part.device))

    def clip_finite(self, max_norm: float) -> None:
        """Scale the gradients of the tensors that are finite on every rank by the norm of these tensors together."""
        squares = [self._squares_by_tensor(index) for index in range(len(self.layouts))]
        finite = [value for of_layout in squares for value in of_layout.values() if math.isfinite(value)]
        factor = min(1.0, max_norm / (math.sqrt(sum(finite)) + 1e-6))
        for index, of_layout in enumerate(squares):
            for piece, part in self._pieces(index):
                if math.isfinite(of_layout[piece.name]):
                    part.mul_(factor)

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
        """Return this rank's gradients of one shard."""
        if getattr(self.zero, "cpu_offload", False) or getattr(self.zero, "offload_optimizer", False):
            wait = getattr(self.zero, "_wait_for_offload_copies", None)
            if wait is not None:
                wait()
            gradient = self.layouts[index].flat.grad
            return [] if gradient is None else [gradient]
        return list(self.zero.averaged_gradients[index])

    def _pieces(self, index: int) -> Iterator[tuple[Slice, Tensor]]:
        """Yield the slices of one shard that this rank stores, each with its gradient."""
        slices, parts = self.layouts[index].slices, self._parts(index)
        if len(parts) == 1 and parts[0].numel() == self.layouts[index].flat.numel():
            parts = [piece.of(parts[0].flatten()) for piece in slices]
        yield from ((piece, part) for piece, part in zip(slices, parts, strict=False) if piece.numel)

    def _squares_by_tensor(self, index: int) -> dict[str, float]:
        """Return the sum of squares of each tensor of one shard over all ranks; it is finite where all elements are."""
        layout = self.layouts[index]
        places = {name: place for place, name in enumerate(layout.shapes)}
        squares = torch.zeros(len(places), dtype=torch.float64, device=layout.comm_device)
        for piece, part in self._pieces(index):
            squares[places[piece.name]] += torch.linalg.vector_norm(part.double()).square().to(squares.device)
        return dict(zip(places, layout.all_reduce(squares, dist.ReduceOp.SUM).tolist(), strict=True))

    def _engine_norm(self) -> Tensor:
        device = self.layouts[0].comm_device
        return torch.tensor(OVERFLOW if self._is_dropped else 0.0, device=device)
