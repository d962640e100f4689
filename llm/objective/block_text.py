"""Draws text block by block: masks of a block are replaced against a cache of the clean tokens before it."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from llm.contracts import BIDIRECTIONAL, RewindableCache, Sight
from llm.generate.decode import new_caches, pad_left
from llm.generate.sampling import check_sampling
from llm.objective.unmasking import RevealOrder, reveal
from llm.objective.whole_text import check_meaning


class BlockText:
    """Prompts that are continued block by block.

    Prompts whose lengths agree modulo the block length are read together. Their whole blocks are read once. Each pass
    then reads the current block against the cache, which is rewound before the next pass. Prompt tokens in the first
    block stay in it as clean tokens. A bos token is never drawn.

    Args:
        model: the decoder.
        prompts: token ids, at least one per prompt.
        max_new_tokens: number of tokens to draw per prompt.
        steps: forward passes per block; None for one per token, which is also the most that a block takes.
        block_length: tokens per block.
        order: which tokens a pass reveals; see `reveal`.
        bos_id: the token that begins each document.
        temperature, top_k, top_p: see `filter_logits`.
        seed: of the draw.
        repetition_penalty: must be 1.
        use_cache: read clean tokens once; False reads the whole text in each pass, which is the definition.

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
        block_length: int,
        order: RevealOrder,
        bos_id: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        repetition_penalty: float = 1.0,
        use_cache: bool = True,
    ) -> None:
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        check_sampling(max_new_tokens=max_new_tokens, steps=steps, **sampling)
        check_meaning(name="block", repetition_penalty=repetition_penalty)
        pad_left(prompts, torch.device("cpu"))  # refuses empty prompts
        self.num_rows, self.num_new = len(prompts), max_new_tokens
        generator = torch.Generator().manual_seed(seed)
        options = {"order": order, "bos_id": bos_id, "sampling": sampling, "generator": generator}
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(len(prompt) % block_length, []).append(row)
        self.groups = [
            (
                rows,
                AlignedBlocks(
                    model,
                    [prompts[row] for row in rows],
                    num_new=max_new_tokens,
                    block_length=block_length,
                    steps=steps,
                    use_cache=use_cache,
                    options=options,
                ),
            )
            for rows in groups.values()
        ]

    def __iter__(self) -> Iterator[Int[Tensor, "batch new"]]:
        streams = [iter(blocks) for _, blocks in self.groups]
        drawn: list[Tensor | None] = [None for _ in streams]
        given = 0
        while given < self.num_new:
            for index, stream in enumerate(streams):
                held = drawn[index]
                if held is None or held.shape[1] <= given:
                    fresh = next(stream)
                    drawn[index] = fresh if held is None else torch.cat([held, fresh], 1)
            known = [tokens for tokens in drawn if tokens is not None]
            stop = min(tokens.shape[1] for tokens in known)
            columns = torch.empty(self.num_rows, stop - given, dtype=torch.long, device=known[0].device)
            for (rows, _), tokens in zip(self.groups, known, strict=True):
                columns[rows] = tokens[:, given:stop]
            given = stop
            yield columns

    def cache_bytes(self) -> int:
        """Return the bytes of the caches."""
        return sum(blocks.cache_bytes() for _, blocks in self.groups)


class AlignedBlocks:
    """Prompts whose lengths agree modulo the block length; iterating yields the new tokens of each block.

    Args:
        model: the decoder.
        prompts: token ids.
        num_new: tokens to draw per prompt.
        block_length: tokens per block.
        steps: passes per block, or None for one per token.
        use_cache: whether clean tokens are read once.
        options: order, bos_id, sampling and generator of `reveal`.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        num_new: int,
        block_length: int,
        steps: int | None,
        use_cache: bool,
        options: dict[str, Any],
    ) -> None:
        self.model, self.num_new, self.block_length = model, num_new, block_length
        self.steps, self.options = steps, options
        ids, positions, documents = pad_left(prompts, next(model.parameters()).device)
        later = torch.arange(1, num_new + 1, device=ids.device)
        masks = torch.full((len(ids), num_new), model.vocab_size, device=ids.device)
        self.length = ids.shape[1]
        self.ids = torch.cat([ids, masks], 1)
        self.positions = torch.cat([positions, positions[:, -1:] + later], 1)
        is_padded = len({len(prompt) for prompt in prompts}) > 1
        self.documents = torch.cat([documents, documents[:, -1:].expand(-1, num_new)], 1) if is_padded else None
        self.caches = new_caches(model, ids, num_new) if use_cache else None

    def __iter__(self) -> Iterator[Int[Tensor, "batch new"]]:
        start, end = self.length - self.length % self.block_length, self.ids.shape[1]
        self._read_prompt(start)
        while start < end:
            stop = min(start + self.block_length, end)
            self._fill(start, stop)
            if stop < end:
                self._append(start, stop)
            yield self.ids[:, max(start, self.length) : stop]
            start = stop

    @torch.inference_mode()
    def _read_prompt(self, stop: int) -> None:
        if stop and self.caches is not None:
            self._run(0, stop, Sight("block", self.block_length))

    @torch.inference_mode()
    def _append(self, start: int, stop: int) -> None:
        """Read the finished block into the cache."""
        if self.caches is not None:
            self._run(start, stop, BIDIRECTIONAL)

    @torch.inference_mode()
    def _fill(self, start: int, stop: int) -> None:
        """Replace the masks of a block."""
        num_masks = stop - max(start, self.length)
        passes = num_masks if self.steps is None else min(self.steps, num_masks)
        for left in range(passes, 0, -1):
            if self.caches is None:
                hidden = self._run(0, stop, Sight("block", self.block_length))[:, start:]
            else:
                hidden = self._run(start, stop, BIDIRECTIONAL)
                for cache in self.caches:
                    assert isinstance(cache, RewindableCache)  # only such attentions serve blocks
                    cache.rewind(start)
            reveal(self.ids[:, start:stop], self.model.logits(hidden), passes_left=left, **self.options)

    def _run(self, start: int, stop: int, sight: Sight) -> Tensor:
        span = slice(start, stop)
        documents = None if self.documents is None else self.documents[:, span]
        inputs = {"positions": self.positions[:, span], "document_ids": documents, "caches": self.caches}
        return self.model(self.ids[:, span], sight=sight, **inputs).hidden

    def cache_bytes(self) -> int:
        """Return the bytes of the caches."""
        return sum(cache.nbytes() for cache in self.caches or ())
