"""Draws text by uniform diffusion: random tokens are replaced, again and again, by what the others suggest."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.generate.sampling import sample_token
from llm.objective.whole_text import UNCHANGED, WholeText

CLEAN_TIME = 10.0
"""The time of tokens that are not noisy: above log(α / (1 − α)) of the lowest level, 6.9."""


class UniformText(WholeText):
    """Prompts that are continued by a fixed number of tokens, which begin at random.

    For levels t > s, each pass draws v in the place of z_i from the exact reverse step, given p from the other tokens:

        q(z | v) · (α_s p_v + (1 − α_s)/V), normalized,   q(z | v) = (α_t/α_s) · 1[v = z] + (1 − α_t/α_s)/V

    The last pass draws from p times the evidence of the noisy token itself, V α_t · 1[v = z] + 1 − α_t. Any token can
    still change until then. A bos token never remains.

    Args:
        model: the decoder.
        prompts: token ids, at least one per prompt.
        steps: forward passes.
        margin: distance of the first and the last level from 1 and 0.
        settings: the other arguments of `WholeText`. The settings of sampling change p as `filter_logits` does;
            temperature 0 puts all of p on its likeliest token.

    Raises:
        ConfigError: a setting lies outside its range or has no meaning here, or a prompt is empty.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], *, steps: int, margin: float, **settings: Any
    ) -> None:
        super().__init__(model, prompts, name="uniform", steps=steps, **settings)
        self.kept = 1 - torch.linspace(1 - margin, margin, steps, dtype=torch.float64)  # α of each pass

    def first_tokens(self, rows: int) -> Int[Tensor, "batch new"]:
        """Return random tokens."""
        return torch.randint(self.model.vocab_size, (rows, self.num_new), generator=self.generator)

    def draw(self, new: Int[Tensor, "batch new"]) -> None:
        """Draw every token anew in each pass."""
        times = torch.full((*self.ids.shape, 1), CLEAN_TIME, device=self.ids.device)
        for kept, kept_after in zip(self.kept.tolist(), [*self.kept[1:].tolist(), 1.0], strict=True):
            times[:, -self.num_new :] = math.log(kept / (1 - kept))
            prediction = self.prediction(self.model.logits(self.read(times=times)).flatten(0, 1).double())
            weights = reverse_weights(prediction, new.flatten(), kept, kept_after)
            new.copy_(sample_token(weights.log(), **UNCHANGED, generator=self.generator).view(new.shape))


def reverse_weights(
    prediction: Float[Tensor, "tokens vocab"], noisy: Int[Tensor, " tokens"], kept: float, kept_after: float
) -> Float[Tensor, "tokens vocab"]:
    """Return the weights, not normalized, of each token's value at the next level; with kept_after = 1, the last draw.

    Args:
        prediction: p of each token given all others.
        noisy: the tokens at the present level.
        kept: α at the present level.
        kept_after: α at the next level, at least `kept`.
    """
    ratio, size = kept / kept_after, prediction.shape[-1]
    mixed = kept_after * prediction + (1 - kept_after) / size
    stays = torch.zeros_like(prediction).scatter_(1, noisy[:, None], 1.0)
    return (ratio * stays + (1 - ratio) / size) * mixed
