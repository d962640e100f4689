"""Inputs of a decoder besides its vocabulary: extra tokens, such as a mask, and times.

Their parameters are created after all others and drawn from a generator of their own. One seed therefore gives every
objective the same shared weights.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from llm.errors import ShapeError

NUM_WAVES = 16
"""Number of frequencies of a time; the highest is 1.5^15 / 4, about 110 radians per unit."""

ADDED = ("extra_embedding.", "time_embedding.")
"""Beginnings of the names of weights that only some objectives have."""


class ExtraEmbedding(nn.Embedding):
    """The vectors of the input ids above the vocabulary."""

    parameter_kinds: ClassVar = {"weight": "embedding"}


class TimeEmbedding(nn.Module):
    """The sum over times of a two-layer network on sines and cosines of λ/4 · 1.5^k, k = 0 … 15.

    The last layers of all times but the first begin at zero, so that a model of one time is continued unchanged.

    Args:
        num_times: number of times per token.
        d_model: width of the residual stream.
    """

    def __init__(self, *, num_times: int, d_model: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(2 * NUM_WAVES, d_model, bias=False) for _ in range(num_times))
        self.outer = nn.ModuleList(nn.Linear(d_model, d_model, bias=False) for _ in range(num_times))

    def forward(self, times: Float[Tensor, "batch time num_times"]) -> Float[Tensor, "batch time d_model"]:
        waves = 1.5 ** torch.arange(NUM_WAVES, device=times.device) / 4
        total: Any = 0.0
        dtype = next(self.parameters()).dtype
        for index, (inner, outer) in enumerate(zip(self.inner, self.outer, strict=True)):
            angles = times[..., index, None].float() * waves
            total = total + outer(F.silu(inner(torch.cat([angles.sin(), angles.cos()], -1).to(dtype))))
        return total


def build_extra_embedding(model: Any, extra_tokens: int) -> ExtraEmbedding | None:
    """Return the embedding of extra tokens, drawn with the deviation of the token embedding; None without any."""
    if not extra_tokens:
        return None
    with torch.random.fork_rng(devices=[]):
        embedding = ExtraEmbedding(extra_tokens, model.d_model)
    std = model.initial_stds.get("token_embedding.weight", model.d_model**-0.5)
    model.initial_stds["extra_embedding.weight"] = draw(embedding.weight, std, stream=1)
    return embedding


def build_time_embedding(model: Any, num_times: int) -> TimeEmbedding | None:
    """Return the embedding of times, drawn as matrices are; None without any."""
    if not num_times:
        return None
    with torch.random.fork_rng(devices=[]):
        embedding = TimeEmbedding(num_times=num_times, d_model=model.d_model)
    for stream, (name, weight) in enumerate(embedding.named_parameters(), start=2):
        part, index, _ = name.split(".")
        std = 0.0 if part == "outer" and index != "0" else weight.shape[-1] ** -0.5
        model.initial_stds[f"time_embedding.{name}"] = draw(weight, std, stream=stream)
    return embedding


@torch.no_grad()
def draw(weight: Tensor, std: float, *, stream: int) -> float:
    """Fill a matrix from a generator of the run's seed and a stream; return the standard deviation."""
    generator = torch.Generator("cpu").manual_seed((torch.initial_seed() + 0x9E3779B97F4A7C15 * stream) % (1 << 63))
    weight.copy_(torch.empty(weight.shape, device="cpu").normal_(0.0, 1.0, generator=generator) * std)
    return std


def with_added(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with those of extra tokens and times from `own` where a model without such inputs has none."""
    return {name: tensor for name, tensor in own.items() if name.startswith(ADDED)} | dict(state)


def look_up(
    tokens: nn.Embedding, extra: nn.Embedding | None, input_ids: Int[Tensor, "batch time"] | None
) -> Float[Tensor, "batch time d_model"]:
    """Return the vectors of input ids; those above the vocabulary belong to `extra`."""
    if input_ids is None:
        raise ShapeError("input_ids=None: the decoder needs token ids or embedded vectors; pass one of them")
    if extra is None:
        return tokens(input_ids)
    is_extra = input_ids >= tokens.num_embeddings
    known = tokens(input_ids.masked_fill(is_extra, 0))
    return torch.where(is_extra[..., None], extra((input_ids - tokens.num_embeddings).clamp_min(0)), known)
