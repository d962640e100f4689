"""Counts the parameters of a module."""

import math
from collections.abc import Iterator

from torch import nn

from llm.contracts import PartiallyActive
from llm.distributed.zero.weights import whole_shape


def own_parameters(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Yield (name, elements, elements active per token) of each parameter; a shared one appears once.

    A module that is `PartiallyActive` uses only its `active_fraction` for a token. Elements are those of the whole
    tensor, also where ZeRO stage 3 has left this rank an empty one.
    """
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        share = _active_share(module)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                numel = math.prod(whole_shape(parameter))
                yield (f"{prefix}.{name}" if prefix else name), numel, round(numel * share)


def _active_share(module: nn.Module) -> float:
    return module.active_fraction if isinstance(module, PartiallyActive) else 1.0


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters, and of those that are active for one token."""
    counts = [(numel, active) for _, numel, active in own_parameters(model)]
    return sum(numel for numel, _ in counts), sum(active for _, active in counts)
