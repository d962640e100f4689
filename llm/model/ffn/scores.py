"""Defines router scores, and the factor that gives routed experts the norm of shared experts or of a dense layer."""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llm.errors import ConfigError

Scores = Literal["softmax", "sigmoid", "relu"]

SCORE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
}

TINY = 1e-20
"""Value added to a sum of scores before division, because all scores of a token may be 0."""

AUTO_SCALE_SAMPLES = 4096
"""Number of random logit vectors over which `auto_routed_scale` averages; the error is below 1 %."""


def divided_by_sum(scores: Float[Tensor, "tokens n"]) -> Float[Tensor, "tokens n"]:
    """Return the scores of each row, divided by their sum."""
    return scores / (scores.sum(-1, keepdim=True) + TINY)


@lru_cache
def auto_routed_scale(
    *, num_experts: int, top_k: int, num_shared_experts: int, scores: Scores, normalize: bool
) -> float:
    """Return λ = E[sqrt(max(s, 1)) / ‖g‖₂], the norm match at initialisation.

    Assumes logits from N(0, 1), and uncorrelated expert outputs of equal norm. The weighted sum over the chosen experts
    then has the norm of the s shared experts' sum, or of one dense layer where there are none. The expectation is taken
    over fixed draws of numpy, so that models can be built on the meta device and no random state changes.

    Source: Su, "MoE tour, part 5", kexue.fm/archives/10945 (s >= 1). Differs: s = 0 counts as 1.
    """
    logits = np.random.default_rng(0).standard_normal((AUTO_SCALE_SAMPLES, num_experts))
    exponentials = np.exp(logits)
    weights = {
        "softmax": exponentials / exponentials.sum(-1, keepdims=True),
        "sigmoid": exponentials / (1 + exponentials),
        "relu": np.maximum(logits, 0),
    }[scores]
    weights = np.sort(weights, axis=-1)[:, -top_k:]
    if normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + TINY)
    norms = np.linalg.norm(weights, axis=-1)
    return float((max(num_shared_experts, 1) ** 0.5 / norms[norms > 0]).mean())


def resolve_routed_scale(routed_scale: float | Literal["auto"], **geometry: object) -> float:
    """Return routed_scale, or the result of `auto_routed_scale` for `geometry` where it is auto.

    Raises:
        ConfigError: the scale is not above 0.
    """
    if routed_scale == "auto":
        return auto_routed_scale(**geometry)  # pyright: ignore[reportArgumentType]
    if not routed_scale > 0:
        raise ConfigError(f"model.ffn.router.routed_scale={routed_scale}: must be above 0; try auto")
    return float(routed_scale)
