"""Exchange of sharded matrices: each is gathered on one rank, processed there, and returned in slices."""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from llm.optim.shard import ShardLayout, Slice


class OwnerExchange:
    """An exchange that gathers each matrix of flat shards on one rank, its owner, so that a rule can process it whole.

    Args:
        layout: layout of the shard.
        cost: function from a matrix's shape to the cost of processing it. Owners are chosen so that ranks have about
            equal cost. The costliest matrices are assigned first; among equal ranks, the one that stores most of the
            matrix becomes its owner.
    """

    def __init__(self, layout: ShardLayout, *, cost: Callable[[tuple[int, ...]], float]) -> None:
        self.layout = layout
        self.owners = choose_owners(layout, cost)
        table, rank = layout.table, layout.rank
        held = [piece for piece in table[rank] if piece.numel]
        ranks = range(len(table))
        self._send = [[piece for piece in held if self.owners[piece.name] == r] for r in ranks]
        self._receive = [
            [piece for piece in table[r] if piece.numel and self.owners[piece.name] == rank] for r in ranks
        ]
        self.owned = {name: layout.shapes[name] for name, owner in self.owners.items() if owner == rank}
        self.elements_sent = 0
        """Number of elements that this rank has sent to other ranks so far, in both directions."""

    def map(self, flat: Tensor, function: Callable[[str, Tensor], Tensor], *, dtype: torch.dtype) -> Tensor:
        """Return `flat` with each tensor in it replaced by `function(name, whole tensor)`, in `dtype`; 0 elsewhere.

        Args:
            flat: tensor with the layout of the shard.
            function: called on the owner of each tensor; it must return the same shape.
            dtype: dtype of what `function` returns.
        """
        pieces = _cut(flat, self._send)
        arrived = self._exchange(pieces, flat.dtype, self._send, self._receive)
        device = self.layout.comm_device
        wholes = {
            name: torch.empty(torch.Size(shape).numel(), dtype=flat.dtype, device=device)
            for name, shape in self.owned.items()
        }
        _paste(arrived, self._receive, lambda piece: wholes[piece.name].narrow(0, piece.start, piece.numel))
        done = {n: function(n, whole.view(self.owned[n])).to(dtype).reshape(-1) for n, whole in wholes.items()}
        answers = [
            torch.cat([done[p.name].narrow(0, p.start, p.numel) for p in part])
            if part
            else torch.empty(0, dtype=dtype, device=device)
            for part in self._receive
        ]
        returned = self._exchange(answers, dtype, self._receive, self._send)
        out = torch.zeros_like(flat, dtype=dtype)
        _paste(returned, self._send, lambda piece: piece.of(out))
        return out

    def _exchange(
        self, parts: list[Tensor], dtype: torch.dtype, going: list[list[Slice]], coming: list[list[Slice]]
    ) -> list[Tensor]:
        """Send part r to rank r, and return the part that each rank sent to this one."""
        layout = self.layout
        if len(parts) == 1:
            return parts
        sizes = [sum(piece.numel for piece in part) for part in coming]
        sent = torch.cat(parts).to(layout.comm_device)
        self.elements_sent += sum(part.numel() for r, part in enumerate(parts) if r != layout.rank)
        arrived = torch.empty(sum(sizes), dtype=dtype, device=layout.comm_device)
        dist.all_to_all_single(arrived, sent, sizes, [part.numel() for part in parts], group=layout.group)
        return list(arrived.split(sizes))


def choose_owners(layout: ShardLayout, cost: Callable[[tuple[int, ...]], float]) -> Mapping[str, int]:
    """Choose an owner for each tensor of a shard; see `balanced_owners`."""
    held = [{piece.name: piece.numel for piece in rows} for rows in layout.table]
    costs = {name: cost(shape) for name, shape in layout.shapes.items()}
    return balanced_owners(costs, ranks=len(held), held=lambda rank, name: held[rank].get(name, 0))


def balanced_owners(
    costs: Mapping[str, float], *, ranks: int, held: Callable[[int, str], int] = lambda rank, name: 0
) -> Mapping[str, int]:
    """Choose an owner for each tensor by the longest-processing-time rule; all ranks compute the same result.

    Args:
        costs: cost of each tensor.
        ranks: number of ranks.
        held: number of a tensor's elements that a rank stores, which decides between equally loaded ranks.
    """
    loads, owners = [0.0] * ranks, {}
    for name in sorted(costs, key=lambda n: (-costs[n], n)):
        owner = min(range(ranks), key=lambda r: (loads[r], -held(r, name), r))
        owners[name] = owner
        loads[owner] += costs[name]
    return owners


def _cut(flat: Tensor, parts: list[list[Slice]]) -> list[Tensor]:
    return [torch.cat([piece.of(flat) for piece in part]) if part else flat.new_empty(0) for part in parts]


def _paste(arrived: list[Tensor], parts: list[list[Slice]], place: Callable[[Slice], Tensor]) -> None:
    for values, part in zip(arrived, parts, strict=True):
        for piece, value in zip(part, values.split([p.numel for p in part]), strict=True):
            place(piece).copy_(value)
