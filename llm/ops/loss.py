"""The vocabulary projection and cross-entropy in one function, which never stores the scores of all tokens."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import IGNORED_LABEL
from llm.errors import ConfigError, ShapeError
from llm.ops.products import product_nn, product_nt, product_tn
from llm.ops.traceable import traceable_op

CHUNK_SCORES = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Vocabulary scores in memory at a time by device, where `chunk_tokens` is None: 32 MiB and 1 GiB in fp32.

Each chunk reads the whole projection and adds to its gradient. On a GPU small chunks would be bound by that traffic.
"""


def chunk_scores(device_type: str) -> int:
    """Return the number of vocabulary scores in memory at a time on a kind of device."""
    return CHUNK_SCORES.get(device_type, CHUNK_SCORES["cpu"])


Reduction = Literal["mean", "sum", "none"]


def reference_linear_cross_entropy(
    hidden: Float[Tensor, "*shape d_model"],
    weight: Float[Tensor, "vocab d_model"],
    labels: Int[Tensor, "*shape"],
    *,
    reduction: Reduction = "mean",
    weights: Float[Tensor, "*shape"] | None = None,
) -> Tensor:
    """Project, then take the cross-entropy in fp32 with all scores in memory: the definition of the fast form."""
    logits = F.linear(hidden, weight).flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    losses = losses if weights is None else losses * weights.flatten()
    if reduction == "none":
        return losses.view(labels.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (labels != IGNORED_LABEL).sum().clamp_min(1)


def linear_cross_entropy(
    hidden: Float[Tensor, "*shape d_model"],
    weight: Float[Tensor, "vocab d_model"],
    labels: Int[Tensor, "*shape"],
    *,
    reduction: Reduction = "mean",
    weights: Float[Tensor, "*shape"] | None = None,
    chunk_tokens: int | None = None,
) -> Float[Tensor, "*result"]:
    """Return the cross-entropy of softmax(hidden weightᵀ) in nats, computed one chunk of tokens at a time.

        loss = − Σ_n log softmax(W h_n)[label_n] / N,   N = number of labels that are not IGNORED_LABEL

    Gradients are computed in the forward pass, from the scores of each chunk. They are stored instead of the scores.
    The backward pass only multiplies them by the incoming gradient. Without a valid label, loss and gradients are 0.

    Args:
        hidden: last hidden states.
        weight: the vocabulary projection.
        labels: token ids; IGNORED_LABEL carries no loss.
        reduction: "mean" over valid labels, "sum", or "none" for one loss per token (0 where ignored) and no gradient.
        weights: factor on the loss of each token; None for 1. The mean is still over the number of valid labels.
        chunk_tokens: tokens per chunk; None for about `chunk_scores` of the device.

    Raises:
        ConfigError: reduction is unknown, chunk_tokens is below 1, or reduction is "none" and a gradient is required.
        ShapeError: labels do not match hidden.

    Source: gradients in the forward pass as in Hsu et al., "Liger Kernel", arXiv:2410.10989, section 3.2.
    """
    chunk = chunk_scores(hidden.device.type) // weight.shape[0] if chunk_tokens is None else chunk_tokens
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    _check(hidden, labels, reduction, chunk_tokens, wants_grad)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    total, losses, _, _ = _cross_entropy(
        hidden.flatten(0, -2),
        weight,
        labels.flatten(),
        None if weights is None else weights.flatten(),
        max(1, chunk),
        dtype,
        wants_grad,
        wants_grad and weight.requires_grad,
    )
    if reduction == "none":
        return losses.view(labels.shape)
    return total if reduction == "sum" else total / (labels != IGNORED_LABEL).sum().clamp_min(1)


@traceable_op(
    "crucible::linear_cross_entropy",
    schema="(Tensor hidden, Tensor weight, Tensor labels, Tensor? weights, int chunk, ScalarType dtype,"
    " bool wants_grad, bool wants_weight) -> (Tensor total, Tensor losses, Tensor grad_hidden, Tensor grad_weight)",
)
def _cross_entropy(
    hidden: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "vocab d_model"],
    labels: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"] | None,
    chunk: int,
    dtype: torch.dtype,
    wants_grad: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the summed loss, the loss per token, and the gradients of the sum that are wanted; others are empty."""
    results = _empty_results(hidden, weight, labels, weights, chunk, dtype, wants_grad, wants_weight)
    total, losses, grad_hidden, grad_weight = results
    grad_weight.zero_()
    projection = weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(labels), chunk):
            span = slice(start, start + chunk)
            ids, states = labels[span], hidden[span].to(dtype)
            slope, losses[span] = _slope_and_loss(product_nt(states, projection), ids)
            if weights is not None:
                slope, losses[span] = slope * weights[span, None].to(slope.dtype), losses[span] * weights[span]
            if wants_grad:
                is_ignored = (ids == IGNORED_LABEL)[:, None]
                grad_hidden[span] = product_nn(slope, projection).masked_fill_(is_ignored, 0.0)
                if wants_weight:
                    grad_weight += product_tn(slope, states.masked_fill(is_ignored, 0.0))
    total.copy_(losses.sum())
    return total, losses, grad_hidden, grad_weight


@_cross_entropy.register_fake
def _empty_results(
    hidden, weight, labels, weights, chunk, dtype, wants_grad, wants_weight
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    precise = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=precise),
        hidden.new_empty(labels.shape, dtype=precise),
        torch.empty_like(hidden) if wants_grad else hidden.new_empty(0),
        torch.empty_like(weight, dtype=precise) if wants_weight else weight.new_empty(0),
    )


def loss_and_byte_sums(
    losses: Float[Tensor, "*shape"], labels: Int[Tensor, "*shape"], token_bytes: Float[Tensor, " vocab"]
) -> Float[Tensor, " 3"]:
    """Return the summed loss in nats, the number of labels and the bytes that they stand for, in fp64."""
    counted = labels >= 0
    num_bytes = token_bytes[labels.clamp_min(0)][counted]
    return torch.stack([losses.double().sum(), counted.double().sum(), num_bytes.double().sum()])


def _slope_and_loss(
    scores: Float[Tensor, "chunk vocab"], ids: Int[Tensor, " chunk"]
) -> tuple[Float[Tensor, "chunk vocab"], Float[Tensor, " chunk"]]:
    """Return d loss / d scores = softmax - one-hot of the label, and the loss per token, 0 where ignored.

    The softmax is computed in at least fp32. Its log-sum-exp is the largest score minus the logarithm of the
    probability of that score, which cannot underflow. The caller masks the slopes of ignored labels.
    """
    precise = torch.promote_types(scores.dtype, torch.float32)
    is_ignored = ids == IGNORED_LABEL
    labels = ids.masked_fill(is_ignored, 0)[:, None]
    best, at = scores.max(-1, keepdim=True)
    chosen = scores.gather(1, labels).to(precise)
    slope = torch.softmax(scores, -1, dtype=precise)
    losses = best.to(precise) - slope.gather(1, at).log() - chosen
    slope.scatter_add_(1, labels, torch.full_like(chosen, -1.0))
    if slope.dtype != scores.dtype:
        slope = scores.copy_(slope)
    return slope, losses[:, 0].masked_fill(is_ignored, 0.0)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.weight_dtype = inputs[1].dtype
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_total: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_weight = ctx.saved_tensors
    # a frozen projection has no gradient
    scaled = (grad_weight * grad_total).to(ctx.weight_dtype) if grad_weight.numel() else None
    return grad_hidden * grad_total.to(grad_hidden.dtype), scaled, *(None,) * 6


_cross_entropy.register_autograd(_backward, setup_context=_save)


def _check(hidden: Tensor, labels: Tensor, reduction: str, chunk_tokens: int | None, wants_grad: bool) -> None:
    if reduction not in get_args(Reduction):
        raise ConfigError(f"loss reduction={reduction}: unknown; use one of {', '.join(get_args(Reduction))}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError(
            f"loss chunk_tokens={chunk_tokens}: must be at least 1; leave it unset to choose it by the vocabulary"
        )
    if reduction == "none" and wants_grad:
        raise ConfigError("loss reduction=none: gives no gradient; use mean or sum, or torch.no_grad()")
    if hidden.shape[:-1] != labels.shape:
        raise ShapeError(
            f"loss labels={tuple(labels.shape)}: must be hidden={tuple(hidden.shape)} without its last axis; "
            "check the batch"
        )
