"""Draws texts whose new tokens all appear at once, after several passes over the whole text."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import BIDIRECTIONAL
from llm.errors import ConfigError
from llm.generate.decode import pad_left_before
from llm.generate.sampling import check_sampling, filter_logits

UNCHANGED = {"temperature": 1.0, "top_k": None, "top_p": None}
"""Settings that draw from the given probabilities themselves."""


class WholeText:
    """The base of prompts that are continued by a fixed number of tokens, which each pass reads and changes.

    Args:
        model: the decoder.
        prompts: token ids, at least one per prompt.
        name: option of the objective, for errors.
        max_new_tokens: number of tokens to draw per prompt.
        steps: forward passes; None for one per token.
        bos_id: the token that begins each document, which is never drawn.
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
        name: str,
        max_new_tokens: int,
        steps: int | None,
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
        check_meaning(name=name, repetition_penalty=repetition_penalty)
        if not use_cache:
            raise ConfigError(f"use_cache=false: objective={name} reads the whole text in each pass anyway; set true")
        self.model, self.num_new, self.bos_id = model, max_new_tokens, bos_id
        self.generator = torch.Generator().manual_seed(seed)
        first = self.first_tokens(len(prompts)).to(next(model.parameters()).device)
        self.ids, self.positions, self.documents = pad_left_before(prompts, first)

    def first_tokens(self, rows: int) -> Int[Tensor, "batch new"]:
        """Return the new tokens before the first pass."""
        raise NotImplementedError

    def draw(self, new: Int[Tensor, "batch new"]) -> None:
        """Change the new tokens in place until they are those of the text."""
        raise NotImplementedError

    def read(self, **inputs: Any) -> Float[Tensor, "batch new d_model"]:
        """Run the decoder on the whole text; return the hidden states of the new tokens."""
        out = self.model(self.ids, positions=self.positions, document_ids=self.documents, sight=BIDIRECTIONAL, **inputs)
        return out.hidden[:, -self.num_new :]

    def prediction(self, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
        """Return p in fp64, changed by the settings of sampling; that of bos is 0."""
        logits[:, self.bos_id] = -torch.inf
        if self.sampling["temperature"] == 0:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        return filter_logits(logits, **self.sampling).double().softmax(-1)

    def __iter__(self) -> Iterator[Int[Tensor, "batch new"]]:
        new = self.ids[:, -self.num_new :]
        with torch.inference_mode():
            self.draw(new)
        yield new

    def cache_bytes(self) -> int:
        """Return 0: nothing is stored between passes."""
        return 0


def check_meaning(*, name: str, repetition_penalty: float) -> None:
    """Raise ConfigError for a setting of next-token decoding that has no meaning where tokens have no fixed order."""
    if repetition_penalty != 1.0:
        raise ConfigError(
            f"repetition_penalty={repetition_penalty}: objective={name} draws tokens in no fixed order, so none has "
            "occurred before another; set repetition_penalty=1.0"
        )
