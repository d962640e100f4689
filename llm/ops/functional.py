"""Fused elementwise functions of a layer for CPUs, each next to the plain form that defines it.

On a CPU, a chain of elementwise operations is bound by memory. The fused forms work on chunks that fit into the cache
of a core, and their hand-written backward passes store only the inputs. The same arithmetic then takes a fraction of
the time and memory. The plain form runs on other devices, for small tensors and under torch.compile, which fuses too.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CHUNK = 1 << 18
"""Elements per chunk: 1 MiB of fp32, which fits into the cache of one core."""

WORTHWHILE = 1 << 19
"""Number of elements below which plain elementwise operations are as fast: their results stay in the cache."""

WORTHWHILE_NORM = 1 << 12
"""The same bound for the norm, whose plain gradient takes many operations."""


def runs_fused(x: Tensor, worthwhile: int) -> bool:
    """Return whether a tensor takes the fused form: large, on a CPU, outside the compiler and function transforms."""
    if x.device.type != "cpu" or x.numel() < worthwhile or torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]


def rms_norm(x: Float[Tensor, "*shape dim"], weight: Float[Tensor, " dim"], eps: float) -> Float[Tensor, "*shape dim"]:
    """Scale to unit root-mean-square, then by a gain: y = g · x / sqrt(mean(x²) + eps), computed in at least fp32.

    Under autocast y has the dtype of autocast, because a product follows a norm; otherwise it has the dtype of x.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if not runs_fused(x, WORTHWHILE_NORM):
        return plain_rms_norm(x, weight, eps, dtype)
    return FusedRMSNorm.apply(x, weight, eps, dtype)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Compute the function by plain operations: the definition."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(precise, weight.shape, weight.to(precise.dtype), eps).to(dtype)


def rotate(
    x: Float[Tensor, "batch time heads head_dim"],
    cos: Float[Tensor, "#batch #time half"],
    sin: Float[Tensor, "#batch #time half"],
) -> Float[Tensor, "batch time heads head_dim"]:
    """Rotate the pair (x_m, x_{m+half}) by its angle, computed in fp32 and returned in the dtype of x.

    The gradient is rotated by the opposite angle. The fused result is stored head by head, as attention reads it.
    """
    if not runs_fused(x, WORTHWHILE):
        return plain_rotate(x, cos, sin)
    return FusedRotation.apply(x, cos, sin)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute the function by plain operations: the definition."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def swiglu(gate: Float[Tensor, "*shape d_ff"], up: Float[Tensor, "*shape d_ff"]) -> Float[Tensor, "*shape d_ff"]:
    """Return silu(gate) ⊙ up; the backward pass stores only gate and up, and recomputes silu."""
    if not runs_fused(gate, WORTHWHILE):
        return plain_swiglu(gate, up)
    return FusedSwiGLU.apply(gate, up)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute the function by plain operations: the definition."""
    return F.silu(gate) * up


def row_spans(x: Tensor) -> Iterator[slice]:
    """Cut the first axis into pieces of about CHUNK elements."""
    rows = max(1, CHUNK * len(x) // max(1, x.numel()))
    return (slice(start, start + rows) for start in range(0, len(x), rows))


class FusedRMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x²) + eps):  dx = r g dy − x r³ mean(g dy x),  dg = Σ r x dy.

    LayerNorm with the mean set to 0 has the same gradients but for −r mean(g dy) in each element of dx. Its kernel
    computes both in one pass, and the term is added back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """Normalize rows; save r for the backward pass."""
        precise = torch.promote_types(x.dtype, torch.float32)
        rows, gain = x.reshape(-1, x.shape[-1]), weight.to(precise)
        out = torch.empty(x.shape, dtype=dtype)
        inverse = torch.empty(len(rows), 1, dtype=precise)
        flat = out.view(rows.shape)
        for span in row_spans(rows):
            part, r = rows[span].to(precise), inverse[span]
            torch.linalg.vector_norm(part, dim=-1, keepdim=True, out=r)
            r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            if dtype == precise:
                torch.mul(part, r, out=flat[span]).mul_(gain)
            else:
                flat[span] = (part * r).mul_(gain)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return dx and dg."""
        x, weight, inverse = ctx.saved_tensors
        precise, width = inverse.dtype, x.shape[-1]
        rows, slopes, gain = x.reshape(-1, width), grad.reshape(-1, width), weight.to(precise)
        parts, grad_gain = [], torch.zeros_like(gain)
        for span in row_spans(rows):
            part, slope, r = rows[span].to(precise), slopes[span].to(precise), inverse[span]
            centered, part_gain, _ = torch.ops.aten.native_layer_norm_backward(
                slope, part, (width,), torch.zeros_like(r), r, gain, None, (True, True, False)
            )
            parts.append(centered.add_((slope @ gain)[:, None].mul_(r).div_(width)).to(x.dtype))
            grad_gain += part_gain
        grad_x = parts[0] if len(parts) == 1 else torch.cat(parts)
        return grad_x.view(x.shape), grad_gain.to(weight.dtype), None, None


class FusedRotation(torch.autograd.Function):
    """A rotation by an angle; its gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x."""
        ctx.save_for_backward(cos, sin)
        batch, time, heads, head_dim = x.shape
        out = x.new_empty(batch, heads, time, head_dim).transpose(1, 2)
        return _turn(x, cos, sin, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Rotate the gradient back; positions have no gradient."""
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, grad.new_empty(grad.shape)), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    precise = torch.promote_types(x.dtype, cos.dtype)
    cos, sin = (y.expand(*x.shape[:2], half)[:, :, None] for y in (cos, sin))
    for part in _row_chunks(x):
        inputs, cosine, sine = x[part].to(precise), cos[part], sin[part]
        first, second = inputs[..., :half], inputs[..., half:]
        turned = torch.cat((first * cosine, second * cosine), dim=-1)
        turned[..., :half].addcmul_(second, sine, value=-1)
        turned[..., half:].addcmul_(first, sine)
        out[part] = turned
    return out


def _row_chunks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut the first two axes into pieces of about CHUNK elements: several whole rows each, or parts of one row."""
    rows = max(1, CHUNK // max(1, x[:1].numel()))
    for start in range(0, len(x), rows):
        times = row_spans(x[start]) if rows == 1 else (slice(None),)
        yield from ((slice(start, start + rows), span) for span in times)


class FusedSwiGLU(torch.autograd.Function):
    """With s = silu(gate):  d up = s dy,  d gate = silu'(gate) up dy."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(gate, up)
        out = torch.empty(gate.shape, dtype=gate.dtype)
        gates, ups, outs = (x.reshape(-1, x.shape[-1]) for x in (gate, up, out))
        for span in row_spans(gates):
            torch.ops.aten.silu.out(gates[span], out=outs[span]).mul_(ups[span])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return d gate and d up."""
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(up.shape, dtype=up.dtype)
        rows = (x.reshape(-1, x.shape[-1]) for x in (grad, gate, up, grad_gate, grad_up))
        slopes, gates, ups, grad_gates, grad_ups = rows
        for span in row_spans(gates):
            torch.ops.aten.silu.out(gates[span], out=grad_ups[span]).mul_(slopes[span])
            slope = slopes[span] * ups[span]
            torch.ops.aten.silu_backward.grad_input(slope, gates[span], grad_input=grad_gates[span])
        return grad_gate, grad_up
