"""Measures how concentrated attention is, alike for softmax and for linear kinds, whose weights may be negative."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from llm.model.attention.attention_layer import Attention
from llm.model.attention.kernels.reference import visible_keys


def concentration(
    weights: Float[Tensor, "batch heads time time_k"], visible: Bool[Tensor, "rows time time_k"]
) -> dict[str, Float[Tensor, "batch heads time"]]:
    """Measure each row of weights a over its n visible keys.

        sparsity = mean|a| / sqrt(mean a²),   in [1/√n, 1]; smaller is more concentrated
        effective_keys = n · sparsity²,       entropy = −Σ p log p nats, p = |a| / Σ|a|

    Source: Su Jianlin, kexue.fm/archives/9889.
    """
    size = weights.abs().double() * visible[:, None]
    count = visible.sum(-1)[:, None].double()
    mean, root = size.sum(-1) / count, (size.square().sum(-1) / count).sqrt()
    sparsity = mean / root.clamp_min(1e-300)
    share = size / size.sum(-1, keepdim=True).clamp_min(1e-300)
    entropy = torch.special.entr(share).sum(-1)
    return {"sparsity": sparsity, "effective_keys": count * sparsity.square(), "entropy": entropy}


@torch.no_grad()
def concentration_by_layer(
    model: nn.Module, input_ids: Int[Tensor, "batch time"] | None = None, *, first_key: int = 16, **inputs: Any
) -> list[dict[str, float]]:
    """Run the decoder once; return means per layer over rows, heads and tokens that see at least `first_key` keys.

    Args:
        model: the decoder.
        input_ids: tokens.
        first_key: tokens that see fewer keys are excluded, because they have little choice.
        inputs: positions, document_ids and the other arguments of `Transformer.forward`.
    """
    found: list[dict[str, float]] = []
    hooks = [
        layer.attention.register_forward_pre_hook(partial(_measure, found, first_key), with_kwargs=True)
        for layer in model.layers  # type: ignore[union-attr]
    ]
    try:
        model(input_ids, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _measure(
    found: list[dict[str, float]], first_key: int, attention: Attention, inputs: tuple[Tensor], options: dict[str, Any]
) -> None:
    (x,) = inputs
    q, k, _ = attention.project(x, document_ids=options["document_ids"])
    keys = {name: options[name] for name in ("positions", "document_ids", "sight")}
    gates: dict[str, Any] = attention.gates(x)
    weights = attention.pair_weights(q, k, **keys, **gates)
    time = x.shape[1]
    visible = visible_keys(time=time, time_k=time, device=x.device, window=attention.window, **keys)
    chosen = (visible.sum(-1) >= first_key).expand(x.shape[0], -1)
    measures = concentration(weights, visible)
    found.append({name: float(value.mean(1)[chosen].mean()) for name, value in measures.items()})
