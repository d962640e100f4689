"""A linear layer whose fp32 products on a CPU run in MKL or oneDNN."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llm.ops.products import is_read_only, product_nn, product_nt, product_tn, read_only_product, uses_onednn
from llm.ops.traceable import traceable_op


class Linear(nn.Linear):
    """A linear layer y = W x + b; large fp32 products on a CPU use `llm.ops.products`, forward and backward."""

    def forward(self, input: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_out"]:
        """Project the last axis."""
        if self.bias is not None or torch.is_autocast_enabled(input.device.type):
            return F.linear(input, self.weight, self.bias)
        return linear_product(input, self.weight)


def biased_linear(d_in: int, d_out: int, *, bias: bool) -> Linear:
    """Return a linear layer whose bias, if any, starts at zero."""
    layer = Linear(d_in, d_out, bias=bias)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def linear_product(
    x: Float[Tensor, "*shape d_in"], weight: Float[Tensor, "d_out d_in"]
) -> Float[Tensor, "*shape d_out"]:
    """Return x Wᵀ; large fp32 products on a CPU use `llm.ops.products`."""
    multiplications = x.numel() * weight.shape[0]
    if is_read_only(x, weight, multiplications):
        return read_only_product(x, weight)
    if uses_onednn(x, weight, multiplications):
        return onednn_linear(x, weight)
    return F.linear(x, weight)


@traceable_op("crucible::linear", schema="(Tensor x, Tensor weight) -> Tensor")
def onednn_linear(x: Float[Tensor, "*shape d_in"], weight: Float[Tensor, "d_out d_in"]) -> Tensor:
    """Return x Wᵀ."""
    return product_nt(x.flatten(0, -2), weight).view(*x.shape[:-1], weight.shape[0])


@onednn_linear.register_fake
def _empty(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@traceable_op(
    "crucible::linear_grad",
    schema="(Tensor grad, Tensor x, Tensor weight) -> (Tensor grad_x, Tensor grad_weight)",
)
def onednn_linear_grad(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return dx = dy W and dW = dyᵀ x."""
    grad_rows = grad.flatten(0, -2)
    return product_nn(grad_rows, weight).view(x.shape), product_tn(grad_rows, x.flatten(0, -2))


@onednn_linear_grad.register_fake
def _empty_grads(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    x, weight = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:  # a frozen layer
        return linear_product_grad(grad, weight), None
    return onednn_linear_grad(grad, x, weight)


onednn_linear.register_autograd(_backward, setup_context=_save)


def linear_product_grad(grad: Float[Tensor, "*shape d_out"], weight: Float[Tensor, "d_out d_in"]) -> Tensor:
    """Return dx = dy W, the gradient of the input alone."""
    return product_nn(grad.flatten(0, -2), weight).view(*grad.shape[:-1], weight.shape[1])


def plain_linear(x: Float[Tensor, "*shape d_in"], weight: Float[Tensor, "d_out d_in"]) -> Tensor:
    """Return x Wᵀ by torch's own product, which defines `linear_product`."""
    return F.linear(x, weight)
