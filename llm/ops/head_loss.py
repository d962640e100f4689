"""A loss per token that is any function of its vocabulary scores, without the scores of all tokens in memory."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llm.ops.loss import chunk_scores
from llm.ops.products import product_nn, product_nt, product_tn

Rule = Callable[..., Tensor]
"""Maps the scores of a chunk [tokens vocab] and its tensors [tokens …] to losses [tokens]; differentiable in scores."""


def reference_head_loss(
    hidden: Float[Tensor, "*shape d_model"], weight: Float[Tensor, "vocab d_model"], rule: Rule, *per_token: Tensor
) -> Float[Tensor, "*shape"]:
    """Project all tokens, then apply the rule in fp32: the definition of the fast form."""
    scores = F.linear(hidden, weight).flatten(0, -2)
    flat = [value.flatten(0, hidden.ndim - 2) for value in per_token]
    return rule(scores.to(torch.promote_types(scores.dtype, torch.float32)), *flat).view(hidden.shape[:-1])


def head_loss(
    hidden: Float[Tensor, "*shape d_model"],
    weight: Float[Tensor, "vocab d_model"],
    rule: Rule,
    *per_token: Tensor,
    chunk_tokens: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "*shape"]]:
    """Return the sum of rule(hidden weightᵀ, …) over tokens, and the losses per token, which have no gradient.

    Each chunk of tokens is projected, the rule is applied in at least fp32, and the gradient with respect to the
    chunk's scores is taken while they are in memory. The backward pass only multiplies the stored gradients.

    Args:
        hidden: last hidden states.
        weight: the vocabulary projection.
        rule: the loss of each token, given its scores and its own tensors.
        per_token: tensors of shape [*shape …] that the rule receives in chunks; they get no gradient.
        chunk_tokens: tokens per chunk; None for about `chunk_scores` of the device.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    chunk = max(1, chunk_scores(device) // weight.shape[0]) if chunk_tokens is None else chunk_tokens
    flat = [value.flatten(0, hidden.ndim - 2) for value in per_token]
    total, losses = _HeadLoss.apply(hidden.flatten(0, -2), weight, rule, chunk, dtype, *flat)
    return total, losses.view(hidden.shape[:-1])


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, rule: Rule, chunk: int, dtype: torch.dtype, *per_token: Tensor
    ) -> tuple[Tensor, Tensor]:
        wants_grad = any(ctx.needs_input_grad[:2])
        precise = torch.promote_types(hidden.dtype, torch.float32)
        projection, losses = weight.to(dtype), hidden.new_empty(len(hidden), dtype=precise)
        grad_hidden = torch.empty_like(hidden) if wants_grad else hidden.new_empty(0)
        grad_weight = torch.zeros_like(weight, dtype=precise) if wants_grad else weight.new_empty(0)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                span = slice(start, start + chunk)
                states = hidden[span].to(dtype)
                scores = product_nt(states, projection).to(precise).requires_grad_(wants_grad)
                with torch.set_grad_enabled(wants_grad):
                    found = rule(scores, *(value[span] for value in per_token))
                    chunk_total = found.sum()
                losses[span] = found.detach()
                if wants_grad:
                    (slope,) = torch.autograd.grad(chunk_total, scores)
                    slope = slope.to(dtype)
                    grad_hidden[span] = product_nn(slope, projection)
                    grad_weight += product_tn(slope, states)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        total = grads[0]
        own = (grad_hidden * total.to(grad_hidden.dtype), (grad_weight * total).to(ctx.weight_dtype))
        return (*own, *(None for _ in ctx.needs_input_grad[2:]))
