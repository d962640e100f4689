"""NorMuon's normalisation of rows, which gives the updates of all neurons the same RMS over time."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

EPS = 1e-10
"""Lower bound of a row's RMS, far below that of an orthogonal matrix, whose mean square is 1 / columns."""


def balance_rows(
    directions: Float[Tensor, "stack blocks rows columns"],
    moments: list[Float[Tensor, "blocks rows 1"]],
    *,
    beta: float,
) -> Float[Tensor, "stack blocks rows columns"]:
    """Divide each row by the root of its running mean square, and keep each matrix's norm.

        v ← β·v + (1−β)·mean(O², columns);  O' = O / √v;  O' ← O'·‖O‖/‖O'‖

    Args:
        directions: orthogonalised updates.
        moments: v of each matrix, updated in place.
        beta: decay rate β of v, in (0, 1).

    Source: Li et al., "NorMuon: Making Muon more efficient and scalable", arXiv:2510.05491, Algorithm 1.
    Differs: the update keeps its own norm, so that `update_scale` means the same with and without normalisation.
    """
    out = []
    for direction, moment in zip(directions, moments, strict=True):
        moment.lerp_(direction.square().mean(-1, keepdim=True), 1 - beta)
        balanced = direction * torch.rsqrt(moment + EPS * EPS)
        old, new = (torch.linalg.matrix_norm(x, keepdim=True) for x in (direction, balanced))
        out.append(balanced * torch.where(new > 0, old / new, 0.0))
    return torch.stack(out)


def row_moments(
    states: Sequence[dict[str, Tensor]], blocks: Float[Tensor, "stack blocks rows columns"]
) -> list[Tensor]:
    """Return the running mean square of each row of each parameter's blocks, from its state; create missing ones."""
    for state in states:
        if "row_moment" not in state:
            state["row_moment"] = blocks.new_zeros(*blocks.shape[1:-1], 1, dtype=torch.float32)
    return [state["row_moment"] for state in states]
