"""Counts the bytes of training: optimizer state by small proxies, activations by the tensors that autograd saves."""

import resource
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llm.contracts import ParamGroup


class SavedBytes:
    """A counter of the bytes that autograd saves for the backward pass, each storage once, without weights.

    Use it as a context manager around a forward pass; `total` is the count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen = {p.untyped_storage()._cdata for p in model.parameters()}
        self._kept: list[Tensor] = []
        self.total = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self._seen:
            self._seen.add(key)
            self._kept.append(tensor)  # a living tensor keeps its address from being used again
            self.total += tensor.untyped_storage().nbytes()
        return tensor

    def __enter__(self) -> "SavedBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)
        self._kept.clear()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of the device; on a CPU, the largest resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def optimizer_state_bytes(
    groups: list[ParamGroup], build: Callable[[list[ParamGroup]], torch.optim.Optimizer]
) -> dict[str, int]:
    """Return the bytes of optimizer state per kind of parameter.

    The optimizer takes one step on small proxies with the same number of axes. An axis of the state that is as long as
    the axis of the proxy is then counted with its true length.
    """
    proxies = [{**group, "params": [_stand_in(p) for p in group["params"]]} for group in groups]
    optimizer = build(proxies)  # type: ignore[arg-type]
    for proxy in proxies:
        for parameter in proxy["params"]:
            parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    totals: dict[str, int] = {}
    for group, proxy in zip(groups, proxies, strict=True):
        for true, small in zip(group["params"], proxy["params"], strict=True):
            state = [value for value in optimizer.state[small].values() if isinstance(value, Tensor)]
            size = sum(_true_bytes(value, small, true) for value in state)
            totals[group["kind"]] = totals.get(group["kind"], 0) + size
    return totals


def _stand_in(parameter: Tensor) -> nn.Parameter:
    shape = [min(length, 5 + 2 * axis) for axis, length in enumerate(parameter.shape)]
    return nn.Parameter(torch.linspace(0.1, 1.0, max(1, torch.Size(shape).numel())).reshape(shape))


def _true_bytes(value: Tensor, small: Tensor, true: Tensor) -> int:
    if value.ndim != small.ndim:
        return value.numel() * value.element_size()
    lengths = [t if v == s else v for v, s, t in zip(value.shape, small.shape, true.shape, strict=True)]
    return torch.Size(lengths).numel() * value.element_size()
