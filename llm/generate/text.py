"""Continues texts: decides where a text ends, streams it, and measures time and memory."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from llm.contracts import DrawnTokens
from llm.errors import ConfigError
from llm.generate.decode import Decoding

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""The character that decoding gives as long as some bytes of a character are missing."""

CONTEXT_TOKENS = 8
"""Last tokens of a prompt that a continuation is decoded after. Decoded alone it can lose its first space."""


@dataclass(frozen=True)
class Generation:
    """Continued texts, with the time and memory that they took."""

    prompts: list[str]
    continuations: list[str]
    num_tokens: int
    """Number of tokens drawn, over all texts, those that end a text included."""
    prefill_seconds: float
    """Seconds until the first token."""
    decode_seconds: float
    """Seconds for all tokens after the first."""
    decode_steps: int
    cache_bytes: int

    @property
    def texts(self) -> list[str]:
        """The prompts, each followed by its continuation."""
        return [prompt + text for prompt, text in zip(self.prompts, self.continuations, strict=True)]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all texts per second of the whole time."""
        return self.num_tokens / max(self.prefill_seconds + self.decode_seconds, 1e-9)


class GrowingText:
    """A text while it is drawn; it ends at the tokenizer's bos token or before a stop string.

    Args:
        tokenizer: with `bos_id` and `decode`.
        stop: strings that end the text and are not part of it.
        prompt: ids that the text follows; SentencePiece tokenizers drop the space before a text that is decoded alone.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.context = list(prompt[-CONTEXT_TOKENS:])
        self.context_text = tokenizer.decode(self.context).rstrip(BROKEN) if self.context else ""
        self.tail = 4 + max((len(s.encode()) for s in stop), default=0)  # tokens that a stop string can lie in
        self.ids: list[int] = []
        self.num_drawn = 0
        self.is_done = False
        self._shown = 0

    def add(self, token: int) -> None:
        """Append the next token, unless the text has ended."""
        if self.is_done:
            return
        self.num_drawn += 1
        if token == self.tokenizer.bos_id:
            self.is_done = True
            return
        self.ids.append(token)
        if self.stop:
            is_short = len(self.ids) <= self.tail
            tail = self._decoded() if is_short else self.tokenizer.decode(self.ids[-self.tail :])
            self.is_done = any(stop in tail for stop in self.stop)

    def finished(self) -> str:
        """Return the text without the stop string that ended it."""
        text = self._decoded()
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        return text[: min(places)] if places else text

    def _decoded(self) -> str:
        return self.tokenizer.decode([*self.context, *self.ids])[len(self.context_text) :]

    def news(self) -> str:
        """Return the new text since the last call, without half characters and without the start of a stop string."""
        text = self.finished()
        if not self.is_done:
            text = text[: len(text) - self._held_back(text)]
        piece, self._shown = text[self._shown :], max(self._shown, len(text))
        return piece

    def _held_back(self, text: str) -> int:
        broken = len(text) - len(text.rstrip(BROKEN))
        longest = max((len(stop) for stop in self.stop), default=0)
        for length in range(min(longest, len(text)), broken, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self.stop):
                return length
        return broken


def encode_prompts(prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the ids of each prompt, after a bos token."""
    return [[tokenizer.bos_id, *map(int, ids)] for ids in tokenizer.encode_batch(list(prompts))]


class Continuation:
    """Prompts that are continued until each reaches the tokenizer's bos token, a stop string, or max_new_tokens.

    Iterating yields the growing texts after every token; `result` then returns the texts with their time and memory.

    Args:
        model: a decoder; its training mode is restored at the end.
        prompts: texts, or lists of ids that are not changed; an empty text starts a document.
        tokenizer: with `bos_id`, `encode_batch` and `decode`.
        stop: strings that end a text and are not part of it.
        decode: draws the tokens, as `llm.contracts.Objective.decode` does; None for one token per pass.
        steps: forward passes of `decode`; None for one per token.
        sampling: see `Decoding`.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        tokenizer: Any,
        stop: Sequence[str] = (),
        decode: Callable[..., DrawnTokens] | None = None,
        steps: int | None = None,
        **sampling: Any,
    ) -> None:
        if "" in stop:
            raise ConfigError("stop=['']: an empty string ends every text at once; remove it")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        ids = [list(prompt) for prompt in prompts if not isinstance(prompt, str)] or encode_prompts(texts, tokenizer)
        self.model, self.prompts = model, texts or [tokenizer.decode(row) for row in ids]
        if steps is not None and decode is None:
            raise ConfigError(f"steps={steps}: a decoder of next tokens takes one pass per token; set steps=null")
        self.decoding = (
            Decoding(model, ids, **sampling) if decode is None else decode(model, ids, steps=steps, **sampling)
        )
        self.max_new_tokens = sampling["max_new_tokens"]
        self.texts = [GrowingText(tokenizer, stop, prompt) for prompt in ids]
        self.prefill_seconds, self.decode_seconds, self.decode_steps = 0.0, 0.0, 0

    def __iter__(self) -> Iterator[list[GrowingText]]:
        last, count = time.perf_counter(), 0
        with _evaluating(self.model):
            for step, columns in enumerate(self.decoding):
                rows = columns.reshape(len(self.texts), -1).tolist()
                for text, row in zip(self.texts, rows, strict=True):
                    for token in row:
                        text.add(token)
                count += len(rows[0])
                now = time.perf_counter()
                if step == 0:
                    self.prefill_seconds = now - last
                else:
                    self.decode_seconds, self.decode_steps = self.decode_seconds + now - last, step
                is_over = all(text.is_done for text in self.texts)
                if is_over or count >= self.max_new_tokens:
                    for text in self.texts:
                        text.is_done = True
                yield self.texts
                if is_over:
                    return
                last = time.perf_counter()

    def result(self) -> Generation:
        """Return the texts so far, with the time and memory that they took."""
        return Generation(
            prompts=self.prompts,
            continuations=[text.finished() for text in self.texts],
            num_tokens=sum(text.num_drawn for text in self.texts),
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            decode_steps=self.decode_steps,
            cache_bytes=self.decoding.cache_bytes(),
        )


def generate(model: Any, prompts: Sequence[str] | Sequence[Sequence[int]], **options: Any) -> Generation:
    """Continue prompts in one batch; see `Continuation`."""
    continuation = Continuation(model, prompts, **options)
    for _ in continuation:
        pass
    return continuation.result()


def generate_text(model: Any, prompts: Sequence[str], **options: Any) -> list[str]:
    """Return each prompt with its continuation; see `Continuation`."""
    return generate(model, prompts, **options).texts


def stream_text(model: Any, prompt: str, **options: Any) -> Iterator[str]:
    """Yield the continuation of one prompt in pieces of whole characters; see `Continuation`."""
    for (text,) in Continuation(model, [prompt], **options):
        if piece := text.news():
            yield piece


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
