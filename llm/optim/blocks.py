"""Conversion of a matrix, a stack of experts or a projection's heads to blocks that are orthogonalised separately."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llm.errors import ConfigError
from llm.optim.grouped_optimizer import CHUNK
from llm.optim.idle_rows import active_rows


def as_blocks(matrix: Tensor, heads: int) -> Tensor:
    """View a parameter as [blocks, rows, columns]: one per expert, or per head along rows (columns if heads < 0)."""
    if matrix.ndim == 3:
        return matrix
    if heads < 0:
        return matrix.unflatten(1, (-heads, -1)).transpose(0, 1)
    return matrix.unflatten(0, (heads, -1))


def from_blocks(blocks: Tensor, heads: int, shape: tuple[int, ...]) -> Tensor:
    """Return the parameter's shape to blocks that `as_blocks` made."""
    if len(shape) == 2 and heads < 0:
        blocks = blocks.transpose(0, 1)
    return blocks.reshape(shape)


def block_shape(shape: tuple[int, ...], heads: int) -> tuple[int, int]:
    """Return the numbers of rows and columns of one block."""
    if len(shape) == 3:
        return shape[1], shape[2]
    return (shape[0], shape[1] // -heads) if heads < 0 else (shape[0] // heads, shape[1])


def check_heads(groups: Sequence[Any]) -> None:
    """Raise ConfigError if the groups state how many heads each projection has, and none has several."""
    heads = [abs(count) for group in groups if isinstance(group, dict) for count in group.get("heads", [])]
    if heads and max(heads) <= 1:
        raise ConfigError(
            "optimizer.by_head=true: no projection of this model has more than one head, so it has no effect; set "
            "optimizer.by_head=false"
        )


def used_blocks(gradient: Tensor) -> Tensor | None:
    """Return which blocks of a gradient are not zero, or None where a CPU finds that all of them are used."""
    if gradient.device.type == "cpu" and bool(gradient[:, 0, 0].all()):
        return None  # a nonzero element per block proves that all are used
    used = active_rows(gradient, (1, 2))
    return None if used.device.type == "cpu" and bool(used.all()) else used.float()


def descend_blocks(
    weight: Tensor, direction: Tensor, used: Tensor | None, *, decay: float, step: float, cautious: bool
) -> None:
    """Apply `move_piece` to the used blocks of one parameter, in cache-sized pieces on a CPU."""
    rows = weight.shape[-2]
    if weight.device.type == "cpu":
        rows = max(1, CHUNK * rows // weight.numel())
    for piece, update in zip(weight.split(rows, -2), direction.split(rows, -2), strict=True):
        move_piece(piece, update, used, decay=decay, step=step, cautious=cautious)


def move_piece(
    piece: Tensor, update: Tensor, used: Tensor | None, *, decay: float, step: float, cautious: bool
) -> None:
    """Apply W ← W − decay·W − step·O to a piece of a matrix.

    Args:
        piece: the weights W, changed in place.
        update: the orthogonalised directions O.
        used: 1 where an element is updated and 0 elsewhere; None where all are.
        decay: lr·λ.
        step: lr·scale.
        cautious: whether to decay only the weights that the update also moves towards 0.
    """
    move = update.float() if used is None else update.float() * used
    if decay:
        share: Tensor | float = 1.0 if used is None else used
        piece.mul_(1 - decay * (share * (move * piece > 0) if cautious else share))
    piece.add_(move, alpha=-step)
