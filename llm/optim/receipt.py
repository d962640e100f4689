"""The receipt: a table of each tensor's update rule, learning rate, weight decay and optimizer state."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from llm.contracts import DescribedOptimizer
from llm.tables import format_table

LAYER = re.compile(r"\.\d+\.")

STATES: dict[type[torch.optim.Optimizer], int] = {
    torch.optim.AdamW: 2,
    torch.optim.Adam: 2,
    torch.optim.RMSprop: 1,
    torch.optim.SGD: 1,
}
"""Number of state tensors of a parameter's size in torch's optimizers; the project's optimizers declare theirs."""


class Line(NamedTuple):
    """The row of one tensor in the receipt."""

    name: str
    shape: tuple[int, ...]
    kind: str
    rule: str
    lr: float
    weight_decay: float
    state_bytes: int

    @property
    def numel(self) -> int:
        """Number of elements of the tensor."""
        return torch.Size(self.shape).numel()


@runtime_checkable
class OptimizerWrapper(Protocol):
    """An object of Lightning or DeepSpeed around an optimizer."""

    @property
    def optimizer(self) -> Any:
        """The wrapped optimizer, or another wrapper."""
        ...


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside the wrappers of Lightning and DeepSpeed."""
    while isinstance(optimizer, OptimizerWrapper):
        optimizer = optimizer.optimizer
    return optimizer


def rule_of(optimizer: Any, group: dict[str, Any]) -> str:
    """Return the name of the rule that `optimizer` applies to `group`; for a foreign optimizer, its class's name."""
    return optimizer.rule_of(group) if isinstance(optimizer, DescribedOptimizer) else type(optimizer).__name__.lower()


def state_bytes(optimizer: Any, group: dict[str, Any], parameter: Tensor) -> int:
    """Return the bytes of state of one parameter: the existing tensors, or the rule's prediction before the first step.

    Exclude scalars, such as torch's step counters, because they do not grow with the parameter.
    """
    held = optimizer.state.get(parameter, {})
    tensors = [value for value in held.values() if isinstance(value, Tensor) and value.numel() > 1]
    if tensors:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if isinstance(optimizer, DescribedOptimizer):
        return optimizer.state_bytes(group, parameter)
    buffers = next((count for kind, count in STATES.items() if isinstance(optimizer, kind)), 0)
    if isinstance(optimizer, torch.optim.SGD) and not group["momentum"]:
        buffers = 0
    return buffers * parameter.numel() * parameter.element_size()


def lines(optimizer: Any) -> list[Line]:
    """Return the rows of the receipt, one per tensor, in the order of the groups."""
    optimizer = unwrap(optimizer)
    return [
        Line(
            name=name,
            shape=tuple(parameter.shape),
            kind=group.get("kind", "?"),
            rule=rule_of(optimizer, group),
            lr=float(group.get("initial_lr", group["lr"])),
            weight_decay=float(group["weight_decay"]),
            state_bytes=state_bytes(optimizer, group, parameter),
        )
        for group in optimizer.param_groups
        for name, parameter in zip(_names(group), whole_parameters(group), strict=True)
    ]


def whole_parameters(group: dict[str, Any]) -> Sequence[Tensor]:
    """Return the tensors of a group, or meta tensors of their shapes if a strategy has split them into flat shards.

    Such a strategy first stores the shapes of the whole tensors in the group's `shapes`.
    """
    if group.get("shapes") in (None, [tuple(parameter.shape) for parameter in group["params"]]):
        return group["params"]
    return [torch.empty(shape, device="meta") for shape in group["shapes"]]


def _names(group: dict[str, Any]) -> Sequence[str]:
    return group.get("names") or [f"parameter {i}" for i in range(len(group["params"]))]


def receipt(optimizer: Any, *, lr_scale: float = 1.0, across_layers: bool = False) -> str:
    """Return a table with the name, shape, kind, rule, peak lr, weight decay and state bytes of each tensor.

    Works for any torch optimizer built from tagged groups, also inside Lightning's wrapper.

    Args:
        optimizer: the optimizer.
        lr_scale: factor of the batch rule on every rate; where the batch grows, the largest one.
        across_layers: combine tensors that differ only in their layer into one row, with their count and total state.
    """
    items = lines(optimizer)
    listed = _across_layers(items) if across_layers else items
    header = ("name", "shape", "kind", "rule", "peak lr", "weight decay", "state bytes")
    rows = [
        (
            item.name,
            " x ".join(map(str, item.shape)) or "scalar",
            item.kind,
            item.rule,
            f"{item.lr * lr_scale:.3g}",
            f"{item.weight_decay:.3g}",
            f"{item.state_bytes:,}",
        )
        for item in listed
    ]
    total_header = ("kind", "rule", "tensors", "parameters", "state bytes", "bytes per parameter")
    tables = [
        format_table(h, r, indent="", underlined=False) for h, r in ((header, rows), (total_header, _totals(items)))
    ]
    return "\n\n".join(tables) + "\n"


def _across_layers(items: list[Line]) -> list[Line]:
    alike: dict[Any, list[Line]] = {}
    for item in items:
        alike.setdefault(item._replace(name=LAYER.sub(".*.", item.name)), []).append(item)
    return [
        key._replace(name=f"{len(same)} x {key.name}", state_bytes=len(same) * key.state_bytes)
        if len(same) > 1
        else same[0]
        for key, same in alike.items()
    ]


def _totals(items: list[Line]) -> list[tuple[str, ...]]:
    """Return one row per kind and rule, and one for all tensors."""
    sums: dict[tuple[str, str], list[Line]] = {}
    for item in items:
        sums.setdefault((item.kind, item.rule), []).append(item)
    sums[("all", "")] = items
    rows = []
    for (kind, rule), members in sums.items():
        numel, held = sum(item.numel for item in members), sum(item.state_bytes for item in members)
        rows.append((kind, rule, f"{len(members):,}", f"{numel:,}", f"{held:,}", f"{held / max(numel, 1):.2f}"))
    return rows
