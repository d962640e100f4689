"""Conversion of a matrix, a stack of experts or a projection's heads to blocks that are orthogonalised separately."""

from torch import Tensor


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
