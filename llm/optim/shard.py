"""The layout of flat shards: which elements of which tensors each rank stores after a strategy has split them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llm.errors import ShapeError


class Slice(NamedTuple):
    """Consecutive elements of one tensor, and their position in a flat shard."""

    name: str
    shape: tuple[int, ...]
    start: int
    """Index of the first element in the whole tensor."""
    numel: int
    offset: int
    """Index of the first element in the shard."""

    def of(self, flat: Tensor) -> Tensor:
        """Return a view of these elements of `flat`, a tensor with the layout of the shard."""
        return flat.narrow(0, self.offset, self.numel)


class Span(NamedTuple):
    """A part of a slice: consecutive whole blocks, or a piece of one block."""

    block: int
    num_blocks: int
    offset: int
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """Return a view of these elements of `flat`, a tensor with the layout of the shard, with one row per block."""
        return flat.narrow(0, self.offset, self.length).view(self.num_blocks, -1)


class ShardLayout:
    """The slices of tensors that one flat shard stores on each rank.

    All ranks must call `all_reduce`, `block_measure` and `active_elements` together, because these communicate.

    Args:
        flat: this rank's shard, a 1-D tensor.
        table: slices of each rank, in the order of ranks.
        rank: index of this rank in `group`.
        group: process group of the ranks that share the tensors; None for all ranks.
    """

    def __init__(self, flat: Tensor, table: Sequence[Sequence[Slice]], *, rank: int, group: Any) -> None:
        self.flat, self.table, self.rank, self.group = flat, [list(rows) for rows in table], rank, group
        self.shapes = {s.name: s.shape for rows in self.table for s in rows}
        backend = dist.get_backend(group) if dist.is_available() and dist.is_initialized() else "gloo"
        self.comm_device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else flat.device

    @property
    def slices(self) -> list[Slice]:
        """Slices that this rank stores."""
        return self.table[self.rank]

    def all_reduce(self, values: Tensor, op: Any) -> Tensor:
        """Return `values` combined over the ranks by `op`, on their own device."""
        moved = values.to(self.comm_device)
        if len(self.table) > 1:
            dist.all_reduce(moved, op=op, group=self.group)
        return moved.to(values.device)

    def block_measure(
        self, values: Tensor, sizes: Mapping[str, int], measure: Callable[[Tensor], Tensor], op: Any
    ) -> dict[str, Tensor]:
        """Compute one number per block of the tensors in `sizes`, also for blocks that are split over several ranks.

        Args:
            values: tensor with the layout of the shard.
            sizes: number of elements per block, by tensor name; it divides the number of elements of the tensor.
            measure: function from rows of elements to one number per row, which `op` can combine.
            op: reduction that combines the numbers of one block's pieces.

        Returns:
            One number per block of each tensor, the same on all ranks.
        """
        counts = {name: _numel(self.shapes[name]) // size for name, size in sizes.items() if name in self.shapes}
        total = torch.zeros(sum(counts.values()), dtype=torch.float64, device=values.device)
        parts = dict(zip(counts, total.split(list(counts.values())), strict=True))
        for piece in self.slices:
            if piece.name in counts:
                for span in spans(piece, sizes[piece.name]):
                    part = parts[piece.name].narrow(0, span.block, span.num_blocks)
                    part.copy_(measure(span.of(values)))
        total = self.all_reduce(total.float() if op == dist.ReduceOp.MAX else total, op)
        return dict(zip(counts, total.split(list(counts.values())), strict=True))

    def mark(self, flags: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor | None:
        """Return a mask of the elements whose block has a nonzero flag, or None if all flags are nonzero.

        The mask has the layout of the shard. It includes the elements of tensors that have no flags.
        """
        if bool(torch.cat([of_tensor.flatten() != 0 for of_tensor in flags.values()]).all()):  # one wait for a GPU
            return None
        mask = torch.ones(self.flat.shape, dtype=torch.bool, device=self.flat.device)
        for piece in self.slices:
            if piece.name in flags:
                for span in spans(piece, sizes[piece.name]):
                    of_span = flags[piece.name].narrow(0, span.block, span.num_blocks) != 0
                    span.of(mask).copy_(of_span[:, None])
        return mask

    def active_elements(self, gradient: Tensor, sizes: Mapping[str, int]) -> Tensor | None:
        """Return a mask of the elements whose block has a nonzero gradient on any rank, or None if all have one."""
        return self.mark(self.block_measure(gradient, sizes, is_active, dist.ReduceOp.MAX), sizes)


def spans(piece: Slice, size: int) -> Iterator[Span]:
    """Split a slice at the boundaries of blocks of `size` elements: a partial block, whole blocks, a partial block."""
    position, end = piece.start, piece.start + piece.numel
    while position < end:
        block, inside = divmod(position, size)
        whole = 0 if inside else (end - position) // size
        length = whole * size if whole else min(size - inside, end - position)
        yield Span(block, max(whole, 1), piece.offset + position - piece.start, length)
        position += length


def rows_to_watch(layout: ShardLayout, kind: str) -> dict[str, int]:
    """Return, by tensor, the elements of one embedding, code or expert, of which a batch may not use all."""
    return {
        name: shape[-1] if kind == "embedding" else _numel(shape) // shape[0]
        for name, shape in layout.shapes.items()
        if kind == "embedding" or len(shape) == 3
    }


def check_coverage(expected: Mapping[str, tuple[int, ...]], layouts: Sequence[ShardLayout]) -> None:
    """Check that the shards store each element of each tensor exactly once.

    Raises:
        ShapeError: if no shard or more than one stores an element, or a tensor has another shape.
    """
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in expected}
    for layout in layouts:
        for piece in (piece for rows in layout.table for piece in rows if piece.numel):
            if expected.get(piece.name) != piece.shape:
                raise ShapeError(
                    f"{piece.name}={piece.shape}: its shard says so, the optimizer was built for "
                    f"{expected.get(piece.name)}; use the DeepSpeed release that pyproject.toml names"
                )
            found[piece.name].append((piece.start, piece.start + piece.numel))
    for name, parts in found.items():
        edges = [0, *(edge for part in sorted(parts) for edge in part), _numel(expected[name])]
        if any(left != right for left, right in zip(edges[::2], edges[1::2], strict=True)):
            raise ShapeError(
                f"{name}={expected[name]}: shards hold the elements {sorted(parts)[:4]}, not each once; use the "
                "DeepSpeed release that pyproject.toml names"
            )


def is_active(rows: Tensor) -> Tensor:
    """Return whether each row has a nonzero element."""
    return (rows.amax(1) != 0) | (rows.amin(1) != 0)


def square_sum(rows: Tensor) -> Tensor:
    """Return the sum of squares of each row."""
    return torch.linalg.vector_norm(rows, dim=1).double().square()


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
