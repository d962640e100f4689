"""Draws text by replacing masks, several tokens per forward pass."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import BIDIRECTIONAL
from llm.errors import ConfigError
from llm.generate.decode import pad_left_before
from llm.generate.sampling import check_sampling, sample_token

RevealOrder = Literal["random", "margin", "confidence"]


class UnmaskedText:
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
        bos_id: the token that begins each document.
        temperature, top_k, top_p: see `filter_logits`.
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
        steps: int | None,
        order: RevealOrder,
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
        check_meaning(name="masked", repetition_penalty=repetition_penalty)
        if not use_cache:
            raise ConfigError("use_cache=false: objective=masked reads the whole text in each pass anyway; set true")
        if steps is not None and steps > max_new_tokens:
            raise ConfigError(f"steps={steps}: above max_new_tokens={max_new_tokens}, one token per pass; lower it")
        self.model, self.num_new, self.bos_id = model, max_new_tokens, bos_id
        self.order: RevealOrder = order
        self.num_passes = max_new_tokens if steps is None else steps
        self.generator = torch.Generator().manual_seed(seed)
        device = next(model.parameters()).device
        masks = torch.full((len(prompts), max_new_tokens), model.vocab_size, device=device)
        self.ids, self.positions, self.documents = pad_left_before(prompts, masks)

    @torch.inference_mode()
    def _draw(self) -> Int[Tensor, "batch new"]:
        new = self.ids[:, -self.num_new :]
        for left in range(self.num_passes, 0, -1):
            out = self.model(
                self.ids, positions=self.positions, document_ids=self.documents, sight=BIDIRECTIONAL
            ).hidden[:, -self.num_new :]
            reveal(
                new,
                self.model.logits(out),
                passes_left=left,
                order=self.order,
                bos_id=self.bos_id,
                sampling=self.sampling,
                generator=self.generator,
            )
        return new

    def __iter__(self) -> Iterator[Int[Tensor, "batch new"]]:
        yield self._draw()

    def cache_bytes(self) -> int:
        """Return 0: nothing is stored between passes."""
        return 0


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


def check_meaning(*, name: str, repetition_penalty: float) -> None:
    """Raise ConfigError for a setting of next-token decoding that has no meaning for masks."""
    if repetition_penalty != 1.0:
        raise ConfigError(
            f"repetition_penalty={repetition_penalty}: objective={name} draws tokens in no fixed order, so none has "
            "occurred before another; set repetition_penalty=1.0"
        )
