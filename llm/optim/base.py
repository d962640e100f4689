"""What every optimizer of the project shares: the one step loop, the checks, and work cut to fit the cache."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from llm.contracts import ParamGroup
from llm.errors import CheckpointError, ConfigError, ShapeError
from llm.optim import foreach
from llm.optim.shard_steps import ShardSteps

CHUNK = 2**19
"""Elements that a CPU works on at once: what a rule reads and writes for them (8 MB) stays in the cache, so that a
rule of several plain operations takes one pass over memory, as a fused kernel would."""

WIDTH = {"matrix": (2, 3), "embedding": (2,), "head": (2,)}
"""Dimensions that a kind of tensor may have; 3 is a stack of experts."""


class Slab(NamedTuple):
    """Pieces of tensors that a rule updates together: equally long lists, matched in shape."""

    params: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, list[Tensor]]
    scratch: list[Tensor] | None
    """Room for one update, on a CPU; on a GPU the caching allocator is as good."""


def in_range(key: str, value: float, low: float, high: float, *, closed: bool = False) -> float:
    """Return `value` if low <= value < high (or <= high, if closed).

    Raises:
        ConfigError: otherwise, and for what is no number.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (low <= value < high or (closed and value == high)):
        raise ConfigError(
            f"optimizer.{key}={value}: must be a number in [{low:g}, {high:g}{']' if closed else ')'}; choose one there"
        )
    return float(value)


def check_betas(key: str, betas: Sequence[float]) -> tuple[float, float]:
    """Return two decay rates in [0, 1).

    Raises:
        ConfigError: another count of them, or one out of range.
    """
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ConfigError(f"optimizer.{key}={betas}: needs two numbers; write for instance [0.9, 0.95]")
    return in_range(key, betas[0], 0.0, 1.0), in_range(key, betas[1], 0.0, 1.0)


class GroupedOptimizer(ShardSteps, torch.optim.Optimizer):
    """Base of the project's optimizers: takes tagged groups, runs one loop, leaves `update` to the rule.

    Args:
        params: groups from `build_param_groups`; they are copied, so that a rule may set what it needs in its own.
        lr: peak learning rate, for groups without their own; >= 0.
        weight_decay: decoupled decay, for groups without their own; >= 0.

    Raises:
        ConfigError: groups without kind and names, a rate or decay out of range.
        ShapeError: a matrix or embedding that arrives with another number of dimensions.
    """

    folds_gradients: ClassVar[bool] = False
    """Whether gradients are consumed during the backward pass, so that none is there to be clipped."""

    def __init__(self, params: list[ParamGroup], *, lr: float, weight_decay: float, **defaults: Any) -> None:
        in_range("lr", lr, 0.0, math.inf)
        in_range("weight_decay", weight_decay, 0.0, math.inf)
        groups = [dict(group) for group in params if isinstance(group, dict)]
        if len(groups) != len(params) or not all("kind" in group and "names" in group for group in groups):
            raise ConfigError("optimizer.params: have no kinds; build the groups with build_param_groups")
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, **defaults})
        for group in self.param_groups:
            in_range(f"lr of {group['kind']}", float(group["lr"]), 0.0, math.inf)
            in_range(f"weight_decay of {group['kind']}", float(group["weight_decay"]), 0.0, math.inf)
            check_shapes(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure, if there is one, then update every parameter that has a gradient."""
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state; buffers stay in fp32 even where the parameters are not (torch would cast them).

        Raises:
            CheckpointError: the state belongs to other parameters.
        """
        own = [name for group in self.param_groups for name in group["names"]]
        saved = [name for group in state_dict["param_groups"] for name in group.get("names", [])]
        if own != saved:
            differing = sorted(set(own) ^ set(saved))[:3]
            raise CheckpointError(
                f"optimizer state={len(saved)} parameters: belongs to another architecture or grouping, it differs in "
                f"{differing}; resume with the configuration of that run"
            )
        super().load_state_dict(state_dict)
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(members, indices, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.dtype == torch.float32:
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    def is_due(self, parameter: Tensor) -> bool:
        """Whether this step updates `parameter`."""
        return parameter.grad is not None

    @abstractmethod
    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update `params`, members of `group` that have gradients."""

    @abstractmethod
    def rule_of(self, group: dict[str, Any]) -> str:
        """Name the rule that `group` gets, for the receipt."""

    def buffers_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Name the state tensors of a parameter's size that the rule of `group` keeps, in fp32."""
        return ("momentum",)

    def state_bytes(self, group: dict[str, Any], parameter: Tensor) -> int:
        """Bytes of state that `parameter` will have."""
        return len(self.buffers_of(group)) * parameter.numel() * 4

    def buffers(self, group: dict[str, Any], params: list[Tensor]) -> dict[str, list[Tensor]]:
        """The state tensors of `params` by name, made of zeros where they are new."""
        names = self.buffers_of(group)
        for parameter in params:
            state = self.state[parameter]
            for name in names:
                if name not in state:
                    state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return {name: [self.state[parameter][name] for parameter in params] for name in names}


def check_shapes(group: dict[str, Any]) -> None:
    """Raise ShapeError if a strategy has flattened or merged the tensors of `group`."""
    params, names, kind = group["params"], group["names"], group["kind"]
    if len(params) != len(names):
        raise ShapeError(
            f"param_groups[{kind}]: {len(names)} tensors arrived merged into {len(params)}; "
            "choose a strategy that keeps each parameter whole (trainer=ddp)"
        )
    legal = WIDTH.get(kind)
    for name, parameter in zip(names, params, strict=True):
        if legal is not None and parameter.ndim not in legal:
            raise ShapeError(
                f"{name}={tuple(parameter.shape)}: a {kind} must have {' or '.join(map(str, legal))} dimensions, a "
                "strategy has flattened it; choose one that keeps each parameter whole (trainer=ddp)"
            )


def gradients_of(params: list[Tensor]) -> list[Tensor]:
    """The gradients in fp32, the gradient itself where it is that already."""
    return [p.grad.to(torch.float32) for p in params if p.grad is not None]


def slabs(params: list[Tensor], gradients: list[Tensor], state: dict[str, list[Tensor]]) -> Iterator[Slab]:
    """Cut the work: on a GPU all tensors at once, for grouped kernels; on a CPU pieces along dim 0 that fit the cache.

    Rows stay whole, so a rule may look at a row; a count of steps goes with every piece.
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
            yield Slab([piece], [gradient], {n: [part] for n, part in zip(pieces, parts, strict=True)}, [scratch])


def between(start: list[Tensor], end: list[Tensor], weight: float, *, out: list[Tensor] | None) -> list[Tensor]:
    """start + weight · (end − start) for each pair, written to `out` if there is room."""
    if out is None:
        return list(foreach.lerp(start, end, weight))
    for room, first, last in zip(out, start, end, strict=True):
        torch.lerp(first, last, weight, out=room)
    return out


def descend(params: list[Tensor], directions: list[Tensor], *, lr: float, weight_decay: float) -> None:
    """θ ← θ − lr · (direction + weight_decay · θ), which is a step of SGD: torch's fused kernel passes over θ once."""
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


def active_rows(gradient: Tensor) -> Tensor:
    """Which rows of an embedding, or experts of a stack, the loss depended on: those with a gradient that is not 0."""
    dims = tuple(range(1, gradient.ndim))
    return (gradient.amax(dims, keepdim=True) != 0) | (gradient.amin(dims, keepdim=True) != 0)  # any() is 8 x slower


def keep_idle_rows(slab: Slab, apply: Callable[[], None]) -> None:
    """Run `apply`, which moves `slab.params`, and put the rows that saw no gradient back where they were."""
    on_cpu = slab.gradients[0].device.type == "cpu"
    if on_cpu and all(bool(g.flatten(1)[:, 0].all()) for g in slab.gradients):  # one element a row tells, mostly
        apply()
        return
    masks = [active_rows(gradient) for gradient in slab.gradients]
    if on_cpu and all(bool(mask.all()) for mask in masks):
        apply()
        return
    before = [parameter.clone() for parameter in slab.params]
    apply()
    for parameter, mask, old in zip(slab.params, masks, before, strict=True):
        parameter.copy_(torch.where(mask, parameter, old))


def has_rows(parameter: Tensor, kind: str) -> bool:
    """Whether a tensor's first axis counts things that may go unused: token rows or experts."""
    return kind == "embedding" or parameter.ndim == 3
