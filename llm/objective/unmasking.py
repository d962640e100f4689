"""Draws text by replacing masks, several tokens per forward pass."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.errors import ConfigError
from llm.generate.sampling import sample_token
from llm.objective.whole_text import WholeText

RevealOrder = Literal["random", "margin", "confidence"]


class UnmaskedText(WholeText):
    """Prompts that are continued by a fixed number of tokens, which begin as masks.

    Each pass reads the whole text and reveals ⌈masks left / passes left⌉ tokens of each row. With perfect conditionals
    and one token per pass, the orders `random` and `margin` sample the model's distribution. More tokens per pass lose
    the dependence between them. A bos token is never drawn.

    Args:
        model: the decoder.
        prompts: token ids, at least one per prompt.
        max_new_tokens: number of tokens to draw per prompt.
        steps: forward passes, at most max_new_tokens; None for one per token.
        order: which tokens a pass reveals; see `reveal`.
        settings: the other arguments of `WholeText`.

    Raises:
        ConfigError: a setting lies outside its range or has no meaning here, or a prompt is empty.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        steps: int | None,
        order: RevealOrder,
        **settings: Any,
    ) -> None:
        super().__init__(model, prompts, name="masked", max_new_tokens=max_new_tokens, steps=steps, **settings)
        if steps is not None and steps > max_new_tokens:
            raise ConfigError(f"steps={steps}: above max_new_tokens={max_new_tokens}, one token per pass; lower it")
        self.order: RevealOrder = order
        self.num_passes = max_new_tokens if steps is None else steps

    def first_tokens(self, rows: int) -> Int[Tensor, "batch new"]:
        """Return masks."""
        return torch.full((rows, self.num_new), self.model.vocab_size)

    def draw(self, new: Int[Tensor, "batch new"]) -> None:
        """Reveal some masks in each pass."""
        for left in range(self.num_passes, 0, -1):
            reveal(
                new,
                self.model.logits(self.read()),
                passes_left=left,
                order=self.order,
                bos_id=self.bos_id,
                sampling=self.sampling,
                generator=self.generator,
            )


def reveal(
    ids: Int[Tensor, "batch new"],
    logits: Float[Tensor, "batch new vocab"],
    *,
    passes_left: int,
    order: RevealOrder,
    bos_id: int,
    sampling: dict[str, Any],
    generator: torch.Generator,
) -> None:
    """Replace ⌈masks left / passes left⌉ masks of each row by tokens that are drawn from their scores.

    Args:
        ids: tokens, changed in place; the id above the vocabulary is the mask. Each row has as many masks.
        logits: scores of each token.
        passes_left: passes that remain, this one included.
        order: `random` draws the places; `margin` takes those whose likeliest token is likeliest; `confidence` draws
            a token everywhere and keeps the likeliest draws.
        bos_id: the token that is never drawn.
        sampling: temperature, top_k and top_p.
        generator: of places and tokens, on the CPU.
    """
    logits = logits.float()
    logits[..., bos_id] = -torch.inf
    hidden = ids == logits.shape[-1]
    count = -(-int(hidden[0].sum()) // passes_left)
    if not count:
        return
    everywhere = order == "confidence"
    drawn = sample_token(logits.flatten(0, 1), **sampling, generator=generator).view(ids.shape) if everywhere else None
    if order == "random":
        preference = torch.rand(ids.shape, generator=generator, dtype=torch.float64).to(ids.device)
    elif drawn is None:
        preference = logits.softmax(-1).amax(-1)
    else:
        preference = logits.softmax(-1).gather(-1, drawn[..., None])[..., 0]
    places = preference.masked_fill(~hidden, -1.0).topk(count, 1).indices
    if drawn is None:
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        chosen = sample_token(logits[rows, places].flatten(0, 1), **sampling, generator=generator).view(places.shape)
    else:
        chosen = drawn.gather(1, places)
    ids.scatter_(1, places, chosen)


def check_unmasking(*, samples: int, steps: int | None) -> None:
    """Raise ConfigError for a number of samples or passes below 1."""
    if samples < 1:
        raise ConfigError(f"objective.samples={samples}: must be at least 1 sample of the bound per window; try 8")
    if steps is not None and steps < 1:
        raise ConfigError(f"objective.steps={steps}: must be at least 1 forward pass; null takes one per token")
