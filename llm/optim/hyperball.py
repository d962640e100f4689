"""Hyperball: steps that turn each matrix and keep its norm, so that the learning rate is a relative step."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from llm.errors import ConfigError
from llm.optim.blocks import block_shape
from llm.optim.shard import ShardLayout, spans


def check_hyperball(groups: Sequence[Any], *, cautious_decay: bool) -> None:
    """Refuse weight decay of matrices, and blocks that are zero, whose norm would stay zero.

    Raises:
        ConfigError: if a group of matrices decays, `cautious_decay` is set, or a matrix has a zero block.
    """
    if cautious_decay:
        raise ConfigError(
            "optimizer.cautious_decay=true: optimizer.hyperball=true keeps each matrix's norm, so no matrix decays; "
            "set one of the two to false"
        )
    for group in groups:
        if group["kind"] != "matrix":
            continue
        if group["weight_decay"] > 0:
            raise ConfigError(
                f"optimizer.weight_decay={group['weight_decay']:g}: optimizer.hyperball=true keeps each matrix's norm, "
                "so decay does nothing; set optimizer.weight_decay=0 (and optimizer.lr=3e-2, a relative step), or "
                "rates.decay_kinds=[embedding,head] to decay other kinds only"
            )
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if not parameter.is_meta and not bool(parameter.detach().flatten(-2).any(-1).all()):
                raise ConfigError(
                    f"optimizer.hyperball=true: {name} has a matrix that starts at zero and would keep the norm 0; "
                    "start it at random values, or set optimizer.hyperball=false"
                )


def ball_factors(products: Float[Tensor, "*blocks 3"], lr: float) -> tuple[Tensor, Tensor]:
    """Return the step size a and the factor f of W ← f·(W − a·O), with which each block keeps its norm.

        a = lr·‖W‖/‖O‖,   f = ‖W‖/‖W − a·O‖,   ‖W − a·O‖² = ‖W‖² − 2a⟨W, O⟩ + a²‖O‖²

    Args:
        products: ⟨W, W⟩, ⟨W, O⟩ and ⟨O, O⟩ of each block, in fp64. A block without a direction does not move.
        lr: the angle of the step in radians, to first order.
    """
    weight, mixed, direction = products.unbind(-1)
    moves = (direction > 0) & (weight > 0)
    step = torch.where(moves, lr * (weight / torch.where(moves, direction, 1.0)).sqrt(), 0.0)
    after = weight - 2 * step * mixed + step.square() * direction
    factor = torch.where(moves & (after > 0), (weight / torch.where(after > 0, after, 1.0)).sqrt(), 1.0)
    return step, factor


def turn_blocks(
    weight: Float[Tensor, "blocks rows columns"], direction: Tensor, used: Tensor | None, *, lr: float
) -> None:
    """Move the used blocks of one parameter along `direction`, and restore their norms.

        a = lr·‖W‖/‖O‖;  W′ = W − a·O;  W ← W′·‖W‖/‖W′‖

    The norm is read at each step, so the rule has no state. In fp32 it drifts by about 3e-6 in 2000 updates.

    Args:
        weight: the blocks W, changed in place.
        direction: the directions O.
        used: 1 for each block that is updated and 0 for others; None where all are.
        lr: learning rate, the relative size of the step.

    Source: MuonH of modded-nanogpt's optimizer track; arXiv:2606.16899; Su, kexue.fm/archives/11196, the sphere.
    """
    move = direction.float() if used is None else direction.float() * used
    old = weight.float()
    products = [torch.linalg.vecdot(x.flatten(1), y.flatten(1)) for x, y in ((old, old), (old, move), (move, move))]
    step, factor = ball_factors(torch.stack(products, -1).double(), lr)
    weight.copy_(torch.addcmul(old, move, -step.float()[:, None, None]).mul_(factor.float()[:, None, None]))


def turn_shard(
    flat: Tensor,
    directions: Tensor,
    layout: ShardLayout,
    *,
    heads: Mapping[str, int],
    active: Tensor | None,
    lr: float,
) -> None:
    """Apply `turn_blocks` to a flat shard, with one reduction over the ranks for the norms of all blocks."""
    move = directions.float() if active is None else directions.float() * active
    sizes = {name: _run(shape, heads[name]) for name, shape in layout.shapes.items()}
    counts = [torch.Size(shape).numel() // sizes[name] for name, shape in layout.shapes.items()]
    total = torch.zeros(sum(counts), 3, dtype=torch.float64, device=flat.device)
    rows = dict(zip(layout.shapes, total.split(counts), strict=True))
    parts = [
        (span, rows[p.name][span.block :][: span.num_blocks]) for p in layout.slices for span in spans(p, sizes[p.name])
    ]
    for span, products in parts:
        weight, update = span.of(flat).float(), span.of(move)
        for place, (x, y) in enumerate(((weight, weight), (weight, update), (update, update))):
            products[:, place] = torch.linalg.vecdot(x, y).double()
    summed = dict(zip(layout.shapes, layout.all_reduce(total, dist.ReduceOp.SUM).split(counts), strict=True))
    factors = {name: _of_blocks(products, heads[name], layout.shapes[name], lr) for name, products in summed.items()}
    for piece in layout.slices:
        steps, scales = factors[piece.name]
        for span in spans(piece, sizes[piece.name]):
            step, scale = (x[span.block :][: span.num_blocks, None].float() for x in (steps, scales))
            span.of(flat).addcmul_(span.of(move), -step).mul_(scale)


def _run(shape: tuple[int, ...], heads: int) -> int:
    """Return the consecutive elements of a block: the whole block, or one of its rows where heads lie side by side."""
    rows, columns = block_shape(shape, heads)
    return columns if len(shape) == 2 and heads < 0 else rows * columns


def _of_blocks(products: Tensor, heads: int, shape: tuple[int, ...], lr: float) -> tuple[Tensor, Tensor]:
    """Return step and factor of each run of a tensor; the rows of a head that lies between others share theirs."""
    if len(shape) == 3 or heads > 0:
        return ball_factors(products, lr)
    step, factor = ball_factors(products.view(-1, -heads, 3).sum(0), lr)
    repeats = len(products) // -heads
    return step.repeat(repeats), factor.repeat(repeats)
