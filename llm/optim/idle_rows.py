"""Finds the embeddings, codes and experts that a batch did not use, and keeps an update from changing them."""

from collections.abc import Callable

import torch
from torch import Tensor

from llm.optim.grouped_optimizer import Slab


def row_axes(parameter: Tensor, kind: str) -> tuple[int, ...] | None:
    """Return the axes of one token's embedding, one code or one expert, of which a batch may not use all.

    None where every batch uses the whole tensor.
    """
    if kind == "embedding":
        return (-1,)
    return (1, 2) if parameter.ndim == 3 else None


def active_rows(gradient: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return which rows along `axes` have a nonzero gradient: the embeddings, codes or experts that the loss used."""
    return (gradient.amax(axes, keepdim=True) != 0) | (
        gradient.amin(axes, keepdim=True) != 0
    )  # any() takes 8 times as long


def keep_idle_rows(slab: Slab, apply: Callable[[], None], axes: tuple[int, ...]) -> None:
    """Run `apply`, which changes `slab.params`, and restore the rows that have no gradient."""
    on_cpu = slab.gradients[0].device.type == "cpu"
    if on_cpu and all(
        bool(g.flatten(axes[0])[..., 0].all()) for g in slab.gradients
    ):  # one element per row usually suffices
        apply()
        return
    masks = [active_rows(gradient, axes) for gradient in slab.gradients]
    if on_cpu and all(bool(mask.all()) for mask in masks):
        apply()
        return
    before = [parameter.clone() for parameter in slab.params]
    apply()
    for parameter, mask, old in zip(slab.params, masks, before, strict=True):
        parameter.copy_(torch.where(mask, parameter, old))
