"""Which elements of which tensors a flat shard holds: what a rule needs when a strategy has cut its tensors up."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llm.errors import ShapeError


class Slice(NamedTuple):
    """Consecutive elements of one tensor, and where they stand in a flat shard."""

    name: str
    shape: tuple[int, ...]
    start: int
    """First element, counted in the whole tensor."""
    numel: int
    offset: int
    """First element, counted in the shard."""

    def of(self, flat: Tensor) -> Tensor:
        """View these elements of a tensor that is laid out as the shard."""
        return flat.narrow(0, self.offset, self.numel)


class Span(NamedTuple):
    """Part of a slice that is a run of whole blocks, or a piece of one."""

    block: int
    num_blocks: int
    offset: int
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """View these elements of a tensor that is laid out as the shard, a row for each block."""
        return flat.narrow(0, self.offset, self.length).view(self.num_blocks, -1)


class ShardLayout:
    """Says, for one flat shard, which slices of which tensors it holds on each rank.

    Every method that talks to other ranks is to be called by all of them.

    Args:
        flat: this rank's shard, 1-D.
        table: the slices of each rank, in the order of ranks.
        rank: this rank's number in `group`.
        group: the ranks that share the tensors; None for all.
    """

    def __init__(self, flat: Tensor, table: Sequence[Sequence[Slice]], *, rank: int, group: Any) -> None:
        self.flat, self.table, self.rank, self.group = flat, [list(rows) for rows in table], rank, group
        self.shapes = {s.name: s.shape for rows in self.table for s in rows}
        backend = dist.get_backend(group) if dist.is_available() and dist.is_initialized() else "gloo"
        self.comm_device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else flat.device

    @property
    def slices(self) -> list[Slice]:
        """What this rank holds."""
        return self.table[self.rank]

    def all_reduce(self, values: Tensor, op: Any) -> Tensor:
        """Combine `values` over the ranks; returned where they were."""
        moved = values.to(self.comm_device)
        if len(self.table) > 1:
            dist.all_reduce(moved, op=op, group=self.group)
        return moved.to(values.device)

    def block_measure(
        self, values: Tensor, sizes: Mapping[str, int], measure: Callable[[Tensor], Tensor], op: Any
    ) -> dict[str, Tensor]:
        """Measure each block of the tensors in `sizes`, cut ones too.

        Args:
            values: laid out as the shard.
            sizes: elements of a block, by tensor; they divide it.
            measure: rows of elements to a number each, in a form that `op` combines.
            op: how numbers of one block's pieces are combined.

        Returns:
            A number for each block of each tensor, the same on all ranks.
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
        """Mark, laid out as the shard, the elements whose block's flag is not 0; None where all flags are set.

        Elements of tensors without flags are marked.
        """
        if all(bool(of_tensor.all()) for of_tensor in flags.values()):
            return None
        mask = torch.ones(self.flat.shape, dtype=torch.bool, device=self.flat.device)
        for piece in self.slices:
            if piece.name in flags:
                for span in spans(piece, sizes[piece.name]):
                    of_span = flags[piece.name].narrow(0, span.block, span.num_blocks) != 0
                    span.of(mask).copy_(of_span[:, None])
        return mask

    def active_elements(self, gradient: Tensor, sizes: Mapping[str, int]) -> Tensor | None:
        """Mark the elements whose block had a gradient that is not 0 on some rank; None where all had one."""
        return self.mark(self.block_measure(gradient, sizes, is_active, dist.ReduceOp.MAX), sizes)


def spans(piece: Slice, size: int) -> Iterator[Span]:
    """Cut a slice where blocks of `size` elements begin: a piece of one, whole ones, a piece of one."""
    position, end = piece.start, piece.start + piece.numel
    while position < end:
        block, inside = divmod(position, size)
        whole = 0 if inside else (end - position) // size
        length = whole * size if whole else min(size - inside, end - position)
        yield Span(block, max(whole, 1), piece.offset + position - piece.start, length)
        position += length


def rows_to_watch(layout: ShardLayout, kind: str) -> dict[str, int]:
    """Elements of a row, by tensor, of those whose first axis counts things that may go unused: tokens or experts."""
    return {
        name: _numel(shape) // shape[0]
        for name, shape in layout.shapes.items()
        if kind == "embedding" or len(shape) == 3
    }


def check_coverage(expected: Mapping[str, tuple[int, ...]], layouts: Sequence[ShardLayout]) -> None:
    """Prove that shards hold each element of each tensor once.

    Raises:
        ShapeError: an element that no shard holds or two do, or a tensor of another shape.
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
    """Whether each row has an element that is not 0."""
    return (rows.amax(1) != 0) | (rows.amin(1) != 0)


def square_sum(rows: Tensor) -> Tensor:
    """Sum of squares of each row."""
    return torch.linalg.vector_norm(rows, dim=1).double().square()


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
