"""Stacks of matrices of one shape, in sizes and an order that suit the device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llm.optim.threads import side_by_side

STACK_ELEMENTS = 2**26
"""Number of elements processed at once on a GPU: 128 MB in bfloat16 use it fully. A CPU processes one matrix."""

Stack = tuple[list[Tensor], int]
"""Matrices of one shape, and the number of heads of each."""


def matrix_stacks(params: Sequence[Tensor], heads: Sequence[int]) -> list[Stack]:
    """Return the matrices in stacks of equal shape and number of heads."""
    buckets: dict[tuple[torch.Size, int], list[Tensor]] = {}
    for parameter, count in zip(params, heads, strict=True):
        buckets.setdefault((parameter.shape, count), []).append(parameter)
    stacks = []
    for (shape, count), members in buckets.items():
        limit = 1 if members[0].device.type == "cpu" else max(1, STACK_ELEMENTS // shape.numel())
        stacks += [(members[start : start + limit], count) for start in range(0, len(members), limit)]
    return stacks


def for_each(stacks: list[Stack], work: Callable[[Stack], None]) -> None:
    """Call `work` for each stack: side by side on the cores of a CPU, one after another on a GPU."""
    if stacks and stacks[0][0][0].device.type == "cpu":
        side_by_side(work, sorted(stacks, key=lambda stack: -stack[0][0].numel()))
        return
    for stack in stacks:
        work(stack)
