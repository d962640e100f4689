"""Applies experts one after another, each to its own rows, which is the fastest way on a CPU.

This is a custom operator for three reasons. Tokens are copied, multiplied, weighted and summed while they are in the
cache. Weights in fp32 are cast, and their gradients cast back, for one expert at a time. A traced model or one on the
meta device needs no token counts per expert.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.model.ffn.activation import largest_size
from llm.ops.kernel_choice import current
from llm.ops.products import is_large_fp32, product_nn, product_nt, product_tn
from llm.ops.situ import Caps, plain_situ_glu, situ_slopes
from llm.ops.traceable import traceable_op

ROW_MULTIPLE = 32
"""The rows of an expert are padded to a multiple of this number.

oneDNN compiles a product for each new shape, which takes longer than the product, and token counts per expert differ
in each forward.
"""


CHUNK = 1 << 19
"""Bytes of a tensor that elementwise work processes at once, so that they stay in a core's cache."""


@traceable_op("crucible::expert_loop")
def expert_loop(
    x: Tensor,
    row_weights: Tensor,
    token_ids: Tensor,
    offsets: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_cap: float = 0.0,
    up_cap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's weighted sum over its experts, gate and up projections, and the largest hidden unit.

    Caps above 0 are those of SiTU-GLU; without them the activation is SwiGLU, and the largest unit is not searched.
    """
    caps = Caps(gate_cap, up_cap) if gate_cap else None
    largest = x.new_zeros((), dtype=torch.float32)
    layout = RowLayout(token_ids, offsets)
    projected, outputs = x.new_empty(2, layout.num_rows, gate.shape[1]), x.new_empty(layout.num_rows, x.shape[1])
    rooms = layout.rooms(x, x.shape[1], gate.shape[1])
    for expert, tokens_of, gated, upped, output in layout.experts(*projected, outputs):
        rows, hidden = (room[: len(tokens_of)] for room in rooms)
        torch.index_select(x, 0, tokens_of, out=rows)
        _product_into(gated, rows, gate[expert].to(x.dtype))
        _product_into(upped, rows, up[expert].to(x.dtype))
        _activate(gated, upped, hidden, caps)
        if caps is not None:
            torch.maximum(largest, largest_size(hidden), out=largest)
        _product_into(output, hidden, down[expert].to(x.dtype))
    projected[:, sum(layout.sizes) :].zero_()
    return layout.sums(outputs, tokens=len(x), weights=row_weights), projected, largest


@expert_loop.register_fake
def _(x: Tensor, row_weights: Tensor, token_ids: Tensor, offsets: Tensor, gate: Tensor, *_: Any) -> Any:
    largest = x.new_empty((), dtype=torch.float32)
    return torch.empty_like(x), x.new_empty(2, most_rows(token_ids, offsets), gate.shape[1]), largest


@traceable_op("crucible::expert_loop_backward")
def expert_loop_backward(
    grad: Tensor,
    x: Tensor,
    row_weights: Tensor,
    token_ids: Tensor,
    offsets: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    projected: Tensor,
    gate_cap: float,
    up_cap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, row_weights, gate, up and down."""
    caps = Caps(gate_cap, up_cap) if gate_cap else None
    width = gate.shape[1]
    layout = RowLayout(token_ids, offsets)
    d_gate, d_up, d_down = (torch.empty_like(stack) for stack in (gate, up, down))
    for expert in layout.idle:
        for stack in (d_gate, d_up, d_down):
            stack[expert].zero_()
    d_rows, d_weights = x.new_empty(layout.num_rows, x.shape[1]), row_weights.new_empty(layout.num_rows, 1)
    rooms = layout.rooms(x, x.shape[1], width, 2 * width)
    each = layout.experts(layout.spread(row_weights.to(x.dtype)), d_weights, *projected, d_rows)
    for expert, tokens_of, weight, d_weight, gated, upped, d_row in each:
        rows, hidden, d_both = (room[: len(tokens_of)] for room in rooms)
        d_out = torch.index_select(grad, 0, tokens_of, out=rows)
        d_hidden = product_nn(d_out, down[expert].to(x.dtype))
        _activate_backward(d_hidden, gated, upped, weight, d_weight, hidden, *d_both.chunk(2, dim=1), caps=caps)
        d_down[expert].copy_(product_tn(d_out, hidden))
        torch.index_select(x, 0, tokens_of, out=rows)
        d_joined = product_tn(d_both, rows)
        d_gate[expert].copy_(d_joined[:width])
        d_up[expert].copy_(d_joined[width:])
        _product_into(d_row, d_both, _joined(gate[expert], up[expert], x.dtype).t())
    return layout.sums(d_rows, tokens=len(x)), layout.collect(d_weights), d_gate, d_up, d_down


@expert_loop_backward.register_fake
def _(grad: Tensor, x: Tensor, row_weights: Tensor, token_ids: Tensor, offsets: Tensor, *weights: Any) -> Any:
    return tuple(torch.empty_like(t) for t in (x, row_weights, *weights[:3]))


def most_rows(token_ids: Tensor, offsets: Tensor) -> int | torch.SymInt:
    """Return the number of rows to allocate for any token counts, since a shape must not depend on values."""
    return token_ids.numel() + offsets.numel() * (ROW_MULTIPLE - 1)


class RowLayout:
    """The order of rows sorted by expert, padded per expert with rows of weight 0, without the rows of empty slots.

    Args:
        token_ids: token of each sorted row.
        offsets: end of each expert's rows.
    """

    def __init__(self, token_ids: Tensor, offsets: Tensor) -> None:
        ends = offsets.tolist()
        counts = [end - start for start, end in pairwise([0, *ends])]
        self.sizes = [-(-count // ROW_MULTIPLE) * ROW_MULTIPLE for count in counts]
        self.idle = [expert for expert, count in enumerate(counts) if not count]
        self.num_sorted, self.num_filled, self.num_rows = token_ids.numel(), ends[-1], most_rows(token_ids, offsets)
        starts = accumulate(self.sizes, initial=0)
        shifts = offsets.new_tensor([new - old for new, old in zip(starts, [0, *ends[:-1]], strict=False)])
        places = torch.arange(self.num_filled, device=token_ids.device)
        self.places = places + shifts.repeat_interleave(offsets.new_tensor(counts))
        self.token_ids = self.spread(token_ids)

    def spread(self, rows: Tensor) -> Tensor:
        """Copy sorted rows to their places; padding is 0."""
        return rows.new_zeros(self.num_rows, *rows.shape[1:]).index_copy_(0, self.places, rows[: self.num_filled])

    def collect(self, rows: Tensor) -> Tensor:
        """Copy rows back from their places; those of empty slots are 0."""
        out = rows.new_zeros(self.num_sorted, *rows.shape[1:])
        torch.index_select(rows, 0, self.places, out=out[: self.num_filled])
        return out

    def sums(self, rows: Tensor, *, tokens: int, weights: Tensor | None = None) -> Tensor:
        """Return the weighted sum of each token's rows in fp32; each row is read once, in the order of tokens."""
        ids, order = self.token_ids[: sum(self.sizes)].sort(stable=True)
        starts = torch.searchsorted(ids, torch.arange(tokens, device=ids.device))
        shares = None if weights is None else self.spread(weights).flatten()[order].to(rows.dtype)
        return F.embedding_bag(order, rows, starts, mode="sum", per_sample_weights=shares)

    def rooms(self, like: Tensor, *widths: int) -> list[Tensor]:
        """Return buffers of each width for the rows of one expert, which are reused and therefore stay in the cache."""
        return [like.new_empty(max(self.sizes), width) for width in widths]

    def experts(self, *rows: Tensor) -> Iterator[Any]:
        """Yield (expert, its token ids, its part of each of `rows`) for each expert that has rows."""
        sizes = [*self.sizes, self.num_rows - sum(self.sizes)]
        parts = zip(*(tensor.split(sizes) for tensor in (self.token_ids, *rows)), strict=True)
        for expert, own in enumerate(parts):
            if expert < len(self.sizes) and sizes[expert]:
                yield expert, *own


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a bᵀ to `out`, without a copy where the product supports it."""
    is_onednn = current().product_forward == "onednn"
    if is_onednn and is_large_fp32(a, b, multiplications=a.numel() * b.shape[0]):
        out.copy_(product_nt(a, b))
    else:
        torch.mm(a, b.t(), out=out)


def _activate(gated: Tensor, upped: Tensor, hidden: Tensor, caps: Caps | None) -> None:
    """Write silu(gate) ⊙ up, or SiTU-GLU, to hidden."""
    for gates, ups, out in _row_parts(gated, upped, hidden):
        if caps is not None:
            out.copy_(plain_situ_glu(gates, ups, caps))
            continue
        torch.ops.aten.silu.out(gates, out=out).mul_(ups)


def _activate_backward(
    d_hidden: Tensor,
    gated: Tensor,
    upped: Tensor,
    weight: Tensor,
    d_weight: Tensor,
    hidden: Tensor,
    d_gated: Tensor,
    d_upped: Tensor,
    *,
    caps: Caps | None,
) -> None:
    """Write w ⊙ the hidden units to hidden, gradients to d_gated, d_upped and d_weight, and overwrite d_hidden."""
    for slope, gates, ups, w, d_w, out, d_gates, d_ups in _row_parts(
        d_hidden, gated, upped, weight, d_weight, hidden, d_gated, d_upped
    ):
        activation, *slopes = [F.silu(gates)] if caps is None else situ_slopes(gates, ups, caps)
        torch.mul(activation, ups, out=out) if caps is None else out.copy_(activation)
        torch.sum(slope * out, 1, keepdim=True, dtype=d_w.dtype, out=d_w)
        out.mul_(w)
        slope.mul_(w)
        if caps is None:
            torch.mul(activation, slope, out=d_ups)
            torch.ops.aten.silu_backward.grad_input(slope.mul_(ups), gates, grad_input=d_gates)
        else:
            d_gates.copy_(slopes[0].mul_(slope))
            d_ups.copy_(slopes[1].mul_(slope))


def _row_parts(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Split tensors with the same number of rows in the same way, so that a part of the first has about CHUNK bytes."""
    count = round(tensors[0].nbytes / CHUNK)
    return zip(*(tensor.chunk(count) for tensor in tensors), strict=True) if count > 1 else [tensors]


def _joined(gate: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
    """Return both projections as one matrix, for one product instead of two."""
    joined = torch.empty(2 * gate.shape[0], gate.shape[1], dtype=dtype, device=gate.device)
    joined[: gate.shape[0]] = gate
    joined[gate.shape[0] :] = up
    return joined


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # the projections have no gradient, and zeros of their size would waste memory
    *tensors, gate_cap, up_cap = inputs
    ctx.caps = (gate_cap, up_cap)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    d_x, d_weights, *d_stacks = expert_loop_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.caps)
    return d_x, d_weights, None, None, *d_stacks, None, None


expert_loop.register_autograd(_backward, setup_context=_save)
