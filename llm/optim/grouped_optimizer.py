"""The base class of the project's optimizers: the step loop, the checks, and the split of work into pieces."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from llm.contracts import ParamGroup
from llm.errors import ConfigError, ShapeError
from llm.optim import foreach
from llm.optim.checks import check_names, in_range
from llm.optim.shard_steps import ShardSteps

CHUNK = 2**19
"""Number of elements that a CPU processes at once. An update rule reads and writes about 8 MB for them, which fits the
cache. A rule of several elementwise operations therefore passes over main memory once, as a fused kernel does."""

WIDTH = {"matrix": (2, 3), "embedding": (2, 3), "head": (2,)}
"""Supported numbers of dimensions per kind of tensor. A matrix with 3 dimensions is a stack of experts, and an
embedding with 3 dimensions has the codes of each head.
"""


class Slab(NamedTuple):
    """Pieces of tensors that a rule updates together. All lists have the same length and matching shapes."""

    params: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, list[Tensor]]
    scratch: list[Tensor] | None
    """Temporary buffers for one update on a CPU; None on a GPU, where the caching allocator is as fast."""


class GroupedOptimizer(ShardSteps, torch.optim.Optimizer):
    """The base class of the project's optimizers: it takes tagged groups and calls the subclass's `update` for each.

    Args:
        params: groups from `build_param_groups`. They are copied, so that a rule can add its own entries.
        lr: peak learning rate of groups that set none; >= 0.
        weight_decay: decoupled weight decay of groups that set none; >= 0.

    Raises:
        ConfigError: if a group has no kind or no names, or a rate or decay is out of range.
        ShapeError: if a matrix or embedding has an unsupported number of dimensions.
    """

    folds_gradients: ClassVar[bool] = False
    """Whether gradients are consumed during the backward pass, so that they cannot be clipped before the step."""

    def __init__(self, params: list[ParamGroup], *, lr: float, weight_decay: float, **defaults: Any) -> None:
        in_range("lr", lr, 0.0, math.inf)
        in_range("weight_decay", weight_decay, 0.0, math.inf)
        groups = [dict(group) for group in params if isinstance(group, dict)]
        if len(groups) != len(params) or not all("kind" in group and "names" in group for group in groups):
            raise ConfigError("optimizer.params: have no kinds; build the groups with build_param_groups")
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, **defaults})
        self.owned_state = {}
        for group in self.param_groups:
            in_range(f"lr of {group['kind']}", float(group["lr"]), 0.0, math.inf)
            in_range(f"weight_decay of {group['kind']}", float(group["weight_decay"]), 0.0, math.inf)
            check_shapes(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure if one is given, then update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if self.is_sharded:
                self.step_shards(group)
                continue
            check_shapes(group)
            members = [parameter for parameter in group["params"] if self.is_due(parameter)]
            if members:
                self.update(group, members)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy: torch's part and the settings of the rule, without the layouts of shards."""
        return super().__getstate__() | {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state and keep its buffers in fp32. torch would cast them to the dtype of the parameters.

        Raises:
            CheckpointError: if the state belongs to other parameters.
        """
        check_names(self.param_groups, state_dict)
        super().load_state_dict(state_dict)
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(members, indices, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.dtype == torch.float32:
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    def is_due(self, parameter: Tensor) -> bool:
        """Return whether this step updates `parameter`."""
        return parameter.grad is not None and parameter.numel() > 0

    @abstractmethod
    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update `params`, the parameters of `group` that have gradients."""

    @abstractmethod
    def rule_of(self, group: dict[str, Any]) -> str:
        """Return the name of the rule that updates `group`, for the receipt."""

    def buffers_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the fp32 state tensors of a parameter's size that the rule of `group` keeps."""
        return ("momentum",)

    def state_bytes(self, group: dict[str, Any], parameter: Tensor) -> int:
        """Return the bytes of state that `parameter` will have."""
        return len(self.buffers_of(group)) * parameter.numel() * 4

    def buffers(self, group: dict[str, Any], params: list[Tensor]) -> dict[str, list[Tensor]]:
        """Return the state tensors of `params` by name; create missing ones as zeros."""
        names = self.buffers_of(group)
        for parameter in params:
            state = self.state[parameter]
            for name in names:
                if name not in state:
                    state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return {name: [self.state[parameter][name] for parameter in params] for name in names}


def check_shapes(group: dict[str, Any]) -> None:
    """Raise ShapeError if a training strategy has flattened or merged the tensors of `group`."""
    params, names, kind = group["params"], group["names"], group["kind"]
    if len(params) != len(names):
        raise ShapeError(
            f"param_groups[{kind}]: {len(names)} tensors arrived merged into {len(params)}; "
            "choose a strategy that keeps each parameter whole (trainer=ddp)"
        )
    allowed = WIDTH.get(kind)
    for name, parameter in zip(names, params, strict=True):
        if allowed is not None and parameter.ndim not in allowed:
            raise ShapeError(
                f"{name}={tuple(parameter.shape)}: a {kind} must have {' or '.join(map(str, allowed))} dimensions, a "
                "strategy has flattened it; choose one that keeps each parameter whole (trainer=ddp)"
            )


def gradients_of(params: list[Tensor]) -> list[Tensor]:
    """Return the gradients in fp32, without a copy where they already are."""
    return [p.grad.to(torch.float32) for p in params if p.grad is not None]


def slabs(params: list[Tensor], gradients: list[Tensor], state: dict[str, list[Tensor]]) -> Iterator[Slab]:
    """Split an update into slabs: all tensors together on a GPU, and pieces along dim 0 that fit the cache on a CPU.

    Rows stay whole, so that a rule can compute a statistic per row. Step counters are passed with every piece.
    """
    if params[0].device.type != "cpu":
        yield Slab(params, gradients, state, None)
        return
    room = torch.empty(0)
    for i, parameter in enumerate(params):
        held = {name: buffers[i] for name, buffers in state.items()}
        whole = [parameter, gradients[i]]
        if parameter.ndim == 0:
            whole, held = [t.view(1) for t in whole], {name: t.view(1) for name, t in held.items()}
        row = max(whole[0][0].numel(), 1)
        rows = max(1, CHUNK // row)
        if room.numel() < (need := min(rows, len(whole[0])) * row):
            room = torch.empty(need)
        pieces = {n: t.split(rows) if t.shape == whole[0].shape else repeat(t) for n, t in held.items()}
        for piece, gradient, *parts in zip(*(t.split(rows) for t in whole), *pieces.values()):  # noqa: B905
            scratch = room[: piece.numel()].view(piece.shape)
            changed = [t.contiguous() for t in (piece, *parts)]  # fused kernels pair elements by their place in memory
            held_parts = {n: [part] for n, part in zip(pieces, changed[1:], strict=True)}
            yield Slab([changed[0]], [gradient.contiguous()], held_parts, [scratch])
            for original, copied in zip((piece, *parts), changed, strict=True):
                if copied is not original:
                    original.copy_(copied)


def between(start: list[Tensor], end: list[Tensor], weight: float, *, out: list[Tensor] | None) -> list[Tensor]:
    """Return start + weight · (end − start) for each pair, and write it to `out` if that is given."""
    if out is None:
        return list(foreach.lerp(start, end, weight))
    for room, first, last in zip(out, start, end, strict=True):
        torch.lerp(first, last, weight, out=room)
    return out


def descend(params: list[Tensor], directions: list[Tensor], *, lr: float, weight_decay: float) -> None:
    """Apply θ ← θ − lr · (direction + weight_decay · θ) with torch's fused SGD kernel, which passes over θ once."""
    if any(p.dtype != d.dtype for p, d in zip(params, directions, strict=True)):
        if weight_decay:
            foreach.mul_(params, 1 - lr * weight_decay)
        foreach.add_(params, directions, alpha=-lr)
        return
    sgd(
        params,
        directions,
        [None] * len(params),
        fused=True,
        lr=lr,
        weight_decay=weight_decay,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )
