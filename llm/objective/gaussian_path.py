"""Embedded tokens, and straight paths to them from Gaussian noise."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

FIRST_SHARE, LAST_SHARE = 0.02, 0.98
"""Quantiles of the logistic distribution between which the levels of training lie."""

LOWEST_COST = 0.02
"""d_model · snr at the lowest level of the bound, whose first term is then 0.01 nats per token."""

ABOVE_LOC = 6.0
"""Distance of the highest log snr of the bound, and of clean tokens, from `loc`."""


class GaussianPath(NamedTuple):
    """The levels λ = log snr of the path x_t = (1 − t) ε + t e_x, where snr = (t / (1 − t))²."""

    loc: float
    scale: float
    d_model: int

    @property
    def lowest(self) -> float:
        """The lowest λ of the bound."""
        return math.log(LOWEST_COST / self.d_model)

    @property
    def highest(self) -> float:
        """The highest λ of the bound, which is also the time of clean tokens."""
        return self.loc + ABOVE_LOC

    def quantiles(self, shares: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the λ of training below which the given shares of it lie: loc + scale · logit(0.02 + 0.96 share)."""
        return self.loc + self.scale * torch.logit(FIRST_SHARE + (LAST_SHARE - FIRST_SHARE) * shares)


def path_of(model: Any, loc: float | str, scale: float) -> GaussianPath:
    """Return the path of a decoder; `loc: auto` is log(log vocab_size / d_model), where half the information is lost.

    Wider embeddings need more noise, as larger pictures do (kexue.fm/archives/10047).
    """
    value = math.log(math.log(model.vocab_size) / model.d_model) if loc == "auto" else float(loc)
    return GaussianPath(value, scale, model.d_model)


def token_vectors(model: Any, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape d_model"]:
    """Return e_v = √d_model · E_v / ‖E_v‖ in at least fp32.

    The embedding is called as a module, so that ZeRO stage 3 gathers it.
    """
    vectors = model.token_embedding(ids)
    precise = torch.promote_types(vectors.dtype, torch.float32)
    return F.normalize(vectors.to(precise), dim=-1) * math.sqrt(model.d_model)


@torch.no_grad()
def vector_table(model: Any, device: torch.device) -> Float[Tensor, "vocab d_model"]:
    """Return e_v of the whole vocabulary as constants."""
    return token_vectors(model, torch.arange(model.vocab_size, device=device))


def posterior_scores(
    scores: Float[Tensor, "tokens vocab"],
    states: Float[Tensor, "tokens d_model"],
    table: Float[Tensor, "vocab d_model"] | None,
) -> Float[Tensor, "tokens vocab"]:
    """Add the evidence √snr · z·e_v of each token's own noisy vector to the scores from all other tokens.

    Args:
        scores: log p of each token given all others, up to a constant.
        states: √snr · z.
        table: e_v, or None for no evidence.
    """
    return scores if table is None else scores + states.to(scores.dtype) @ table.to(scores.dtype).T
