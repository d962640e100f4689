"""Draws tokens for prompts of any lengths in one batch; with a cache each token is read once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from llm.errors import ConfigError
from llm.generate.sampling import check_sampling, penalize_repetition, sample_token

PADDING_DOCUMENT = -1
"""Document id of the padding to the left of a short prompt: attention never crosses documents."""


class Decoding:
    """Prompts that are continued; iterating yields the next token of every row, [batch], max_new_tokens times.

    Shorter prompts are padded on the left with a document of their own, which no real token sees.

    Args:
        model: a decoder with `new_caches` and `logits`.
        prompts: token ids, at least one per prompt.
        max_new_tokens: number of tokens to draw per prompt.
        temperature: 0 is greedy.
        top_k: see `filter_logits`.
        top_p: see `filter_logits`.
        seed: seed of the random numbers.
        repetition_penalty: see `penalize_repetition`.
        use_cache: read each token once; False reads the whole text again for every token, which is the definition.

    Raises:
        ConfigError: a setting lies outside its range, or a prompt is empty.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        repetition_penalty: float = 1.0,
        use_cache: bool = True,
    ) -> None:
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        check_sampling(max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty, **self.sampling)
        self.model, self.max_new_tokens, self.penalty = model, max_new_tokens, repetition_penalty
        self.generator = torch.Generator().manual_seed(seed)
        device = next(model.parameters()).device
        self.ids, self.positions, self.documents = pad_left(prompts, device)
        self.is_padded = len({len(prompt) for prompt in prompts}) > 1
        self.caches = new_caches(model, self.ids, max_new_tokens) if use_cache else None

    def __iter__(self) -> Iterator[Int[Tensor, " batch"]]:
        fresh = slice(None)
        for _ in range(self.max_new_tokens):
            yield self._step(fresh)
            fresh = slice(None) if self.caches is None else slice(-1, None)

    @torch.inference_mode()
    def _step(self, fresh: slice) -> Int[Tensor, " batch"]:
        """Read the tokens not yet read, draw the next token of each row, and append it."""
        documents = self.documents[:, fresh] if self.is_padded else None
        hidden = self.model(
            self.ids[:, fresh], positions=self.positions[:, fresh], document_ids=documents, caches=self.caches
        ).hidden
        logits = self.model.logits(hidden[:, -1:])[:, 0]
        if self.penalty != 1.0:
            logits = penalize_repetition(logits, self.ids.where(self.documents >= 0, -1), self.penalty)
        token = sample_token(logits, **self.sampling, generator=self.generator)
        self.ids = torch.cat([self.ids, token[:, None]], 1)
        self.positions = torch.cat([self.positions, self.positions[:, -1:] + 1], 1)
        self.documents = torch.cat([self.documents, self.documents[:, -1:]], 1)
        return token

    def cache_bytes(self) -> int:
        """Return the bytes of the caches."""
        return sum(cache.nbytes() for cache in self.caches or ())


def stream_tokens(model: Any, prompts: Sequence[Sequence[int]], **sampling: Any) -> Iterator[Int[Tensor, " batch"]]:
    """Yield the next token of every prompt, max_new_tokens times; see `Decoding`."""
    yield from Decoding(model, prompts, **sampling)


def new_caches(model: Any, ids: Tensor, max_new_tokens: int) -> list[Any]:
    """Return empty caches for prompts and max_new_tokens further tokens, in the dtype of the forward pass."""
    kind = ids.device.type
    weights = next(model.parameters()).dtype
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights
    return model.new_caches(batch=ids.shape[0], max_length=ids.shape[1] + max_new_tokens, dtype=dtype)


def pad_left_before(
    prompts: Sequence[Sequence[int]], new: Int[Tensor, "batch new"]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ids, positions and document ids of prompts with the same number of tokens behind each.

    The document ids are None where all prompts have one length, so that kernels without documents are used.

    Raises:
        ConfigError: there is no prompt, or one is empty.
    """
    ids, positions, documents = pad_left(prompts, new.device)
    later = torch.arange(1, new.shape[1] + 1, device=new.device)
    is_padded = len({len(prompt) for prompt in prompts}) > 1
    documents = torch.cat([documents, documents[:, -1:].expand(-1, new.shape[1])], 1)
    return (
        torch.cat([ids, new], 1),
        torch.cat([positions, positions[:, -1:] + later], 1),
        documents if is_padded else None,
    )


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, positions and document ids of prompts that end in the same column.

    Raises:
        ConfigError: there is no prompt, or one is empty.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise ConfigError("prompt=[]: each prompt needs at least one token; begin with the tokenizer's bos_id")
    longest = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    positions, documents = torch.zeros_like(ids), torch.full_like(ids, PADDING_DOCUMENT)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(list(prompt))
        positions[row, longest - len(prompt) :] = torch.arange(len(prompt))
        documents[row, longest - len(prompt) :] = 0
    return ids.to(device), positions.to(device), documents.to(device)
