"""Draws text by uniform diffusion: random tokens are replaced, again and again, by what the others suggest."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import BIDIRECTIONAL
from llm.errors import ConfigError
from llm.generate.decode import pad_left_before
from llm.generate.sampling import check_sampling, filter_logits, sample_token
from llm.objective.unmasking import check_meaning

CLEAN_TIME = 10.0
"""The time of tokens that are not noisy: above log(α / (1 − α)) of the lowest level, 6.9."""

DRAW = {"temperature": 1.0, "top_k": None, "top_p": None}
"""Draws from the given probabilities themselves."""


def log_odds(kept: Tensor) -> Tensor:
    """Return log(α / (1 − α)), the time of a noisy token."""
    return torch.logit(kept)


class UniformText:
    """Prompts that are continued by a fixed number of tokens, which begin at random.

    For levels t > s, each pass draws v in the place of z_i from the exact reverse step, given p from the other tokens:

        q(z | v) · (α_s p_v + (1 − α_s)/V), normalized,   q(z | v) = (α_t/α_s) · 1[v = z] + (1 − α_t/α_s)/V

    The last pass draws from p times the evidence of the noisy token itself, V α_t · 1[v = z] + 1 − α_t. Any token can
    still change until then. A bos token never remains.

    Args:
        model: the decoder.
        prompts: token ids, at least one per prompt.
        max_new_tokens: number of tokens to draw per prompt.
        steps: forward passes.
        margin: distance of the first and the last level from 1 and 0.
        bos_id: the token that begins each document.
        temperature, top_k, top_p: change p as `filter_logits` does; temperature 0 puts all of p on its likeliest token.
        seed: of the draw.
        repetition_penalty: must be 1.
        use_cache: must be true.

    Raises:
        ConfigError: a setting lies outside its range or has no meaning here, or a prompt is empty.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        steps: int,
        margin: float,
        bos_id: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        repetition_penalty: float = 1.0,
        use_cache: bool = True,
    ) -> None:
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        check_sampling(max_new_tokens=max_new_tokens, steps=steps, **self.sampling)
        check_meaning(name="uniform", repetition_penalty=repetition_penalty)
        if not use_cache:
            raise ConfigError("use_cache=false: objective=uniform reads the whole text in each pass anyway; set true")
        self.model, self.num_new, self.bos_id = model, max_new_tokens, bos_id
        self.kept = 1 - torch.linspace(1 - margin, margin, steps, dtype=torch.float64)  # α of each pass
        self.generator = torch.Generator().manual_seed(seed)
        device = next(model.parameters()).device
        new = torch.randint(model.vocab_size, (len(prompts), max_new_tokens), generator=self.generator).to(device)
        self.ids, self.positions, self.documents = pad_left_before(prompts, new)

    @torch.inference_mode()
    def _draw(self) -> Int[Tensor, "batch new"]:
        new = self.ids[:, -self.num_new :]
        times = torch.full((*self.ids.shape, 1), CLEAN_TIME, device=self.ids.device)
        for index, kept in enumerate(self.kept.tolist()):
            times[:, -self.num_new :] = float(log_odds(torch.tensor(kept)))
            out = self.model(
                self.ids, positions=self.positions, document_ids=self.documents, sight=BIDIRECTIONAL, times=times
            ).hidden[:, -self.num_new :]
            is_last = index + 1 == len(self.kept)
            prediction = self._prediction(self.model.logits(out).flatten(0, 1).double())
            weights = reverse_weights(prediction, new.flatten(), kept, 1.0 if is_last else float(self.kept[index + 1]))
            new.copy_(sample_token(weights.log(), **DRAW, generator=self.generator).view(new.shape))
        return new

    def _prediction(self, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
        """Return p in fp64, changed by the settings of sampling; that of bos is 0."""
        logits[:, self.bos_id] = -torch.inf
        if self.sampling["temperature"] == 0:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        return filter_logits(logits, **self.sampling).double().softmax(-1)

    def __iter__(self) -> Iterator[Int[Tensor, "batch new"]]:
        yield self._draw()

    def cache_bytes(self) -> int:
        """Return 0: nothing is stored between passes."""
        return 0


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
