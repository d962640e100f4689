"""Reads from a ZeRO engine which slices of which parameters its flat shards store.

It reads private attributes of the engine. pyproject.toml therefore pins one release, and
`llm.optim.shard.check_coverage` checks the result at each start.
"""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from llm.errors import ShapeError
from llm.optim.shard import ShardLayout, Slice


def read_layouts(zero: Any, names: Mapping[int, str]) -> list[ShardLayout]:
    """Return the layout of each flat shard that the optimizer inside `zero` steps; called by all ranks together.

    Args:
        zero: DeepSpeed's ZeRO optimizer, of stage 1, 2 or 3.
        names: names of the parameters, by `id`.

    Raises:
        ShapeError: an engine of another kind.
    """
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        rows = [_stage_3_slices(zero, index, names) for index in range(len(zero.fp16_groups))]
        flats = zero.fp32_partitioned_groups_flat
        groups = [zero._get_sub_group_process_group(index) for index in range(len(rows))]
    elif hasattr(zero, "single_partition_of_fp32_groups"):
        rows = [_stage_2_slices(group, names) for group in zero.bit16_groups]
        flats, groups = zero.single_partition_of_fp32_groups, zero.real_dp_process_group
    else:
        raise ShapeError(f"engine={type(zero).__name__}: its shards cannot be read; use trainer.stage=1, 2 or 3")
    return [_layout(flat, own, group) for flat, own, group in zip(flats, rows, groups, strict=True)]


def _layout(flat: Any, own: list[Slice], group: Any) -> ShardLayout:
    table: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(table, [tuple(piece) for piece in own], group=group)
    slices = [[Slice(*row) for row in rows] for rows in table]
    return ShardLayout(flat, slices, rank=dist.get_rank(group), group=group)


def _stage_2_slices(group: list[Any], names: Mapping[int, str]) -> list[Slice]:
    """Return the slices of stages 1 and 2, which concatenate the parameters of a group and cut the result into equal
    parts.
    """
    slices = []
    for parameter in group:
        held = parameter._hp_mapping
        if held is not None:
            whole, part = held.lp_fragment_address, held.hp_fragment_address
            shape = tuple(parameter.shape)
            slices.append(Slice(names[id(parameter)], shape, int(whole.start), int(whole.numel), int(part.start)))
    return slices


def _stage_3_slices(zero: Any, index: int, names: Mapping[int, str]) -> list[Slice]:
    """Return the slices of stage 3, which cuts each parameter into equal parts, pads the last, and concatenates a
    rank's parts.
    """
    rank = dist.get_rank(zero._get_sub_group_process_group(index))
    slices = []
    for parameter in zero.fp16_groups[index]:
        _, offset, length = zero.grad_position[zero.get_param_id(parameter)]
        start = min(rank * length, parameter.ds_numel)
        numel = min(length, parameter.ds_numel - start)
        slices.append(Slice(names[id(parameter)], tuple(parameter.ds_shape), start, numel, int(offset)))
    return slices
