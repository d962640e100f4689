"""Muon on ranks that hold equal weights and gradients: each matrix is orthogonalised on one of them."""

from typing import Any

import torch
from torch import Tensor

from llm.optim import foreach
from llm.optim.blocks import as_blocks
from llm.optim.grouped_optimizer import gradients_of
from llm.optim.matrix_stacks import Stack, for_each, matrix_stacks
from llm.optim.muon_shards import iteration_cost
from llm.optim.rank_shares import RankShares


def update_on_ranks(muon: Any, group: dict[str, Any], params: list[Tensor], shares: RankShares) -> None:
    """Orthogonalise the matrices of this rank's share, exchange the directions, and move every matrix.

    Momenta are updated on every rank, so that each has the whole state for a checkpoint.

    Args:
        muon: the optimizer.
        group: parameter group of the matrices.
        params: matrices with a gradient, the same on all ranks.
        shares: the ranks.
    """
    heads = muon.heads_of(group, params)
    owners = shares.owners([iteration_cost(tuple(parameter.shape)) for parameter in params])
    _advance_momenta(muon, group, [p for p, owner in zip(params, owners, strict=True) if owner != shares.rank])
    found: dict[int, Tensor] = {}

    def find(stack: Stack) -> None:
        found.update(zip(map(id, stack[0]), muon.directions(group, *stack), strict=True))

    mine = [p for p, owner in zip(params, owners, strict=True) if owner == shares.rank]
    for_each(matrix_stacks(mine, muon.heads_of(group, mine)), find)
    places = {id(parameter): index for index, parameter in enumerate(params)}
    dtypes = {muon.products(parameter, count) for parameter, count in zip(params, heads, strict=True)}
    directions = shares.gather(
        {places[key]: direction for key, direction in found.items()},
        owners,
        shapes=[as_blocks(parameter, count).shape for parameter, count in zip(params, heads, strict=True)],
        like=params[0].new_empty(0, dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32),
    )

    def move(stack: Stack) -> None:
        members, count = stack
        dtype = muon.products(members[0], count)
        stacked = torch.stack([directions[places[id(parameter)]] for parameter in members])
        muon.descend_stack(group, members, count, stacked.to(dtype))

    for_each(matrix_stacks(params, heads), move)


def _advance_momenta(muon: Any, group: dict[str, Any], params: list[Tensor]) -> None:
    """Update the momenta of matrices that another rank orthogonalises."""
    if params:
        foreach.lerp_(muon.buffers(group, params)["momentum"], gradients_of(params), 1 - muon.momentum)
