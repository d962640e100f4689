"""The experts one after another, each on its own rows: what a CPU does fastest.

An operator of its own rather than plain code for three reasons: tokens are copied, multiplied and weighted while they
are in the cache; weights held in fp32 are cast, and their gradients cast back, an expert at a time; and a traced or
storage-less model need not know how many tokens an expert has.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.ffn.rows import sum_rows


@torch.library.custom_op("crucible::expert_loop", mutates_args=())
def expert_loop(
    x: Tensor,
    row_weights: Tensor,
    token_ids: Tensor,
    rows: Tensor,
    offsets: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's weighted sum over its experts, and the two projections that the backward pass needs."""
    gated, upped = (x.new_empty(token_ids.numel(), gate.shape[1]) for _ in range(2))
    out = x.new_empty(token_ids.numel(), x.shape[1])
    for expert, (start, end) in enumerate(_ranges(offsets)):
        if start == end:
            continue
        tokens = x.index_select(0, token_ids[start:end])
        torch.mm(tokens, gate[expert].to(x.dtype).t(), out=gated[start:end])
        torch.mm(tokens, up[expert].to(x.dtype).t(), out=upped[start:end])
        hidden = F.silu(gated[start:end]).mul_(upped[start:end]).mul_(row_weights[start:end, None])
        torch.mm(hidden, down[expert].to(x.dtype).t(), out=out[start:end])
    out[int(offsets[-1]) :].zero_()
    return sum_rows(out, rows, x.shape[0]), gated, upped


@expert_loop.register_fake
def _(
    x: Tensor, row_weights: Tensor, token_ids: Tensor, rows: Tensor, offsets: Tensor, gate: Tensor, *_: Tensor
) -> Any:
    hidden = (token_ids.numel(), gate.shape[1])
    return torch.empty_like(x), x.new_empty(hidden), x.new_empty(hidden)


@torch.library.custom_op("crucible::expert_loop_backward", mutates_args=())
def expert_loop_backward(
    grad: Tensor,
    x: Tensor,
    row_weights: Tensor,
    token_ids: Tensor,
    rows: Tensor,
    offsets: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gated: Tensor,
    upped: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, row_weights, gate, up and down."""
    d_weights, d_gate, d_up, d_down = (torch.empty_like(t) for t in (row_weights, gate, up, down))
    d_rows = x.new_empty(token_ids.numel(), x.shape[1])
    for expert, (start, end) in enumerate(_ranges(offsets)):
        if start == end:
            for stack in (d_gate, d_up, d_down):
                stack[expert].zero_()
            continue
        part = slice(start, end)
        tokens, d_out = x.index_select(0, token_ids[part]), grad.index_select(0, token_ids[part])
        activation = F.silu(gated[part])
        hidden = activation * upped[part]
        d_hidden = d_out @ down[expert].to(x.dtype)
        d_weights[part] = (d_hidden * hidden).sum(1)
        weight = row_weights[part, None]
        _product(d_out.t(), hidden.mul_(weight), out=d_down[expert])
        d_hidden.mul_(weight)
        d_upped = activation.mul_(d_hidden)
        d_gated = torch.ops.aten.silu_backward(d_hidden.mul_(upped[part]), gated[part])
        _product(d_gated.t(), tokens, out=d_gate[expert])
        _product(d_upped.t(), tokens, out=d_up[expert])
        torch.mm(d_gated, gate[expert].to(x.dtype), out=d_rows[part])
        d_rows[part].addmm_(d_upped, up[expert].to(x.dtype))
    end = int(offsets[-1])
    d_weights[end:].zero_()
    d_rows[end:].zero_()
    return sum_rows(d_rows, rows, x.shape[0]), d_weights, d_gate, d_up, d_down


@expert_loop_backward.register_fake
def _(grad: Tensor, x: Tensor, row_weights: Tensor, a: Tensor, b: Tensor, c: Tensor, *weights: Tensor) -> Any:
    return tuple(torch.empty_like(t) for t in (x, row_weights, *weights[:3]))


def _ranges(offsets: Tensor) -> list[tuple[int, int]]:
    return list(pairwise([0, *offsets.tolist()]))


def _product(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """Write a b into `out`, casting where `out` is wider."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    d_x, d_weights, *d_stacks = expert_loop_backward(grad.contiguous(), *ctx.saved_tensors)
    return d_x, d_weights, None, None, None, *d_stacks


expert_loop.register_autograd(_backward, setup_context=_save)
