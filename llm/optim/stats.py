"""Statistics of an optimizer's update, computed from the parameters before and after it."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


def pooled_rms(tensors: list[Tensor]) -> Tensor:
    """Return the root mean square over all elements of all tensors."""
    squares = torch.stack([tensor.detach().float().square().sum() for tensor in tensors]).sum()
    return (squares / sum(tensor.numel() for tensor in tensors)).sqrt()


def orthogonality_error(update: Float[Tensor, "*stack rows columns"]) -> Float[Tensor, ""]:
    """Return the distance of matrices from multiples of orthogonal ones: 0 if all singular values are equal.

        e = ‖m·A / tr A − I‖_F / √m,  A = U·Uᵀ or Uᵀ·U, whichever is the smaller, of size m x m

    For a stack, return the mean over its matrices. An m x n matrix of independent signs has about √(m/n); dependent
    signs give more. Five quintic steps give 0.3 to 0.48, and more if singular values are near 0.
    """
    update = update.detach().float()
    if update.shape[-2] > update.shape[-1]:
        update = update.mT
    size = update.shape[-2]
    gram = update @ update.mT
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    identity = torch.eye(size, device=gram.device)
    error = torch.linalg.matrix_norm(size * gram / torch.where(trace > 0, trace, 1.0) - identity) / size**0.5
    return error.mean()


class Move(NamedTuple):
    """A tensor with a copy of its values before the update, from which the update can be computed afterwards."""

    parameter: Tensor
    """The parameter itself, which has the new values after the update."""
    before: Tensor
    """A copy of the values before the update."""
    lr: float
    weight_decay: float

    @property
    def change(self) -> Tensor:
        """Difference of the values before and after the update, including weight decay."""
        return self.before.float() - self.parameter.detach().float()

    @property
    def update(self) -> Tensor:
        """Difference without weight decay: before · (1 − lr·λ) − after."""
        return self.before.float() * (1 - self.lr * self.weight_decay) - self.parameter.detach().float()


def moves_to_come(groups: Iterable[Mapping[str, Any]]) -> dict[str, list[Move]]:
    """Copy the parameters of an optimizer before its update, and return them by kind; groups may share a kind."""
    moves: dict[str, list[Move]] = {}
    for group in groups:
        rates = float(group["lr"]), float(group["weight_decay"])
        own = moves.setdefault(group["kind"], [])
        own += [Move(parameter, parameter.detach().clone(), *rates) for parameter in group["params"]]
    return moves


def kind_stats(moves: list[Move]) -> dict[str, Tensor]:
    """Return the RMS of the update and of the weights, and their ratio, over all tensors of a kind."""
    update = pooled_rms([move.change for move in moves])
    weight = pooled_rms([move.parameter for move in moves])
    return {"update_rms": update, "weight_rms": weight, "update_ratio": update / weight.clamp_min(1e-30)}


def sampled_orthogonality(moves: list[Move], *, samples: int) -> Tensor:
    """Return the mean `orthogonality_error` of the updates of up to `samples` matrices, evenly spaced in the list."""
    count = len(moves)
    chosen = sorted({round(i * (count - 1) / max(samples - 1, 1)) for i in range(samples)})
    return torch.stack([orthogonality_error(moves[i].update) for i in chosen]).mean()
