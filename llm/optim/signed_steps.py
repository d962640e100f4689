"""Tiger's step on whole tensors: pieces with a rate of their own, their sizes, and the move by signs."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm.optim import foreach
from llm.optim.grouped_optimizer import Slab, descend


class RatedPiece(NamedTuple):
    """A tensor, or one expert of a stack, with its gradient, its momentum and the lower bound of its RMS."""

    param: Tensor
    gradient: Tensor
    momentum: Tensor
    floor: float


def experts_of(param: Tensor, gradient: Tensor, momentum: Tensor, floor: float) -> Iterator[RatedPiece]:
    """Yield each expert of a stack as a stack of one, so that each has a rate of its own; other tensors whole."""
    if param.ndim < 3:
        yield RatedPiece(param, gradient, momentum, floor)
        return
    for one, its_gradient, its_momentum in zip(param.split(1), gradient.split(1), momentum.split(1), strict=True):
        yield RatedPiece(one, its_gradient, its_momentum, floor)


def norms_of(params: list[Tensor]) -> list[Tensor]:
    """Return ‖θ‖ of each tensor. On a CPU reduce rows first: torch takes a whole tensor's norm with one thread."""
    if params[0].device.type != "cpu":
        return list(foreach.norm(params))
    return [torch.linalg.vector_norm(torch.linalg.vector_norm(parameter, dim=-1)) for parameter in params]


def move_by_sign(slab: Slab, rates: list[float], group: dict[str, Any], *, floors: list[float]) -> None:
    """Apply θ ← θ − η·(sign(m) + λθ), where η is one number per tensor, or per row of an embedding."""
    momenta, decay = slab.state["momentum"], float(group["weight_decay"])
    if slab.scratch is None:
        signs = list(foreach.sign(momenta))
    else:
        signs = [torch.sign(m, out=room) for m, room in zip(momenta, slab.scratch, strict=True)]
    if group["kind"] == "embedding":
        for parameter, sign, rate, floor in zip(slab.params, signs, rates, floors, strict=True):
            rms = torch.linalg.vector_norm(parameter, dim=-1, keepdim=True).div_(parameter.shape[-1] ** 0.5)
            eta = rms.clamp_(min=floor).mul_(rate)
            if decay:
                parameter.mul_(1 - decay * eta)
            parameter.addcmul_(sign, eta, value=-1)
    elif len(set(rates)) == 1:
        descend(slab.params, signs, lr=rates[0], weight_decay=decay)
    else:
        if decay:
            foreach.mul_(slab.params, [1 - rate * decay for rate in rates])
        foreach.mul_(signs, rates)
        foreach.sub_(slab.params, signs)
