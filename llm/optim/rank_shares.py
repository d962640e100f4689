"""Divides work on tensors that every rank holds over the ranks, and gives all results to each of them."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llm.optim.exchange import balanced_owners


class RankShares:
    """The ranks of a process group that hold equal weights and gradients, as under DDP.

    Args:
        group: the process group; None for all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Return the rank that processes each tensor, such that ranks have about equal cost; equal on all ranks."""
        found = balanced_owners({f"{index:06}": cost for index, cost in enumerate(costs)}, ranks=self.size)
        return [found[f"{index:06}"] for index in range(len(costs))]

    def gather(
        self, own: Mapping[int, Tensor], owners: Sequence[int], shapes: Sequence[torch.Size], like: Tensor
    ) -> list[Tensor]:
        """Return all results in order, by one exchange.

        Args:
            own: this rank's results by index.
            owners: the rank of each result.
            shapes: the shape of each result.
            like: a tensor with the dtype and device of the exchange.
        """
        sizes = [
            sum(shape.numel() for shape, owner in zip(shapes, owners, strict=True) if owner == r)
            for r in range(self.size)
        ]
        sent = like.new_zeros(max(sizes))
        if own:
            sent[: sizes[self.rank]] = torch.cat([own[index].reshape(-1) for index in sorted(own)])
        arrived, taken, results = self.exchange(sent), [0] * self.size, []
        for shape, owner in zip(shapes, owners, strict=True):
            start = taken[owner]
            taken[owner] += shape.numel()
            results.append(arrived[owner][start : taken[owner]].view(shape))
        return results

    def exchange(self, sent: Tensor) -> list[Tensor]:
        """Return the tensor of every rank; all have one size."""
        arrived = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather([x.view(torch.uint8) for x in arrived], sent.view(torch.uint8), group=self.group)
        return arrived
