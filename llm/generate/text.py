"""Texts in, texts out: where a text ends, how it streams, and what it cost."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from llm.errors import ConfigError
from llm.generate.decode import Decoding

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a character decodes to as long as some of its bytes are missing."""


@dataclass(frozen=True)
class Generation:
    """Continued texts, and what they cost."""

    prompts: list[str]
    continuations: list[str]
    num_tokens: int
    """Tokens drawn that are part of a text or end it, over all texts."""
    prefill_seconds: float
    """Until the first token."""
    decode_seconds: float
    """For all tokens after the first."""
    decode_steps: int
    cache_bytes: int

    @property
    def texts(self) -> list[str]:
        """Each prompt with its continuation."""
        return [prompt + text for prompt, text in zip(self.prompts, self.continuations, strict=True)]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all texts over the whole time."""
        return self.num_tokens / max(self.prefill_seconds + self.decode_seconds, 1e-9)


class GrowingText:
    """One text while it is drawn: it ends at the tokenizer's bos token or before a stop string.

    Args:
        tokenizer: with `bos_id` and `decode`.
        stop: strings that end the text and are no part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tail = 4 + max((len(s.encode()) for s in stop), default=0)  # tokens that a stop string can lie in
        self.ids: list[int] = []
        self.num_drawn = 0
        self.is_done = False
        self._shown = 0

    def add(self, token: int) -> None:
        """Take the next token; without effect once the text has ended."""
        if self.is_done:
            return
        self.num_drawn += 1
        if token == self.tokenizer.bos_id:
            self.is_done = True
            return
        self.ids.append(token)
        if self.stop:
            tail = self.tokenizer.decode(self.ids[-self.tail :])
            self.is_done = any(stop in tail for stop in self.stop)

    def finished(self) -> str:
        """Return the text without what ended it."""
        text = self.tokenizer.decode(self.ids)
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        return text[: min(places)] if places else text

    def news(self) -> str:
        """Return what can be shown since the last call: no half characters, nothing that may begin a stop string."""
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
    """Return the ids of each prompt, each beginning a document."""
    return [[tokenizer.bos_id, *map(int, ids)] for ids in tokenizer.encode_batch(list(prompts))]


class Continuation:
    """Prompts being continued until each meets the tokenizer's bos token, a stop string, or max_new_tokens.

    Iterating gives the growing texts after every token; `result` then says what came of them.

    Args:
        model: a decoder; left in the mode it was in.
        prompts: texts, an empty one starting a document; or their ids, as they are to be read.
        tokenizer: with `bos_id`, `encode_batch` and `decode`.
        stop: strings that end a text and are no part of it.
        sampling: see `Decoding`.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        tokenizer: Any,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> None:
        if "" in stop:
            raise ConfigError("stop=['']: an empty string ends every text at once; leave it out")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        ids = [list(prompt) for prompt in prompts if not isinstance(prompt, str)] or encode_prompts(texts, tokenizer)
        self.model, self.prompts = model, texts or [tokenizer.decode(row) for row in ids]
        self.decoding = Decoding(model, ids, **sampling)
        self.texts = [GrowingText(tokenizer, stop) for _ in prompts]
        self.prefill_seconds, self.decode_seconds, self.decode_steps = 0.0, 0.0, 0

    def __iter__(self) -> Iterator[list[GrowingText]]:
        last = time.perf_counter()
        with _evaluating(self.model):
            for step, column in enumerate(self.decoding):
                for text, token in zip(self.texts, column.tolist(), strict=True):
                    text.add(token)
                now = time.perf_counter()
                if step == 0:
                    self.prefill_seconds = now - last
                else:
                    self.decode_seconds, self.decode_steps = self.decode_seconds + now - last, step
                is_over = all(text.is_done for text in self.texts)
                if is_over or step + 1 == self.decoding.max_new_tokens:
                    for text in self.texts:
                        text.is_done = True
                yield self.texts
                if is_over:
                    return
                last = time.perf_counter()

    def result(self) -> Generation:
        """Return the texts as they stand, and what they cost."""
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
    """Continue prompts side by side; see `Continuation`."""
    continuation = Continuation(model, prompts, **options)
    for _ in continuation:
        pass
    return continuation.result()


def generate_text(model: Any, prompts: Sequence[str], **options: Any) -> list[str]:
    """Return each prompt with its continuation; see `Continuation`."""
    return generate(model, prompts, **options).texts


def stream_text(model: Any, prompt: str, **options: Any) -> Iterator[str]:
    """Yield the continuation of one prompt piece by piece, as soon as characters are whole; see `Continuation`."""
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
