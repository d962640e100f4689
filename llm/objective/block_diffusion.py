"""Block diffusion: blocks of tokens are generated from left to right, and masked diffusion fills each block."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm.contracts import IGNORED_LABEL, Batch, LossShare, Noise, Prepared, Sight, TokenNLL
from llm.errors import ConfigError
from llm.objective.block_text import BlockText
from llm.objective.scoring import label_count, scored_tokens, weighted_loss
from llm.objective.unmasking import RevealOrder, check_unmasking
from llm.ops.noise import MASKS


class BlockDiffusion:
    """A bound of the negative log-likelihood by masked diffusion inside blocks of L tokens.

        −log p(x) ≤ Σ_b E_{l_b ~ U{1..n_b}} (n_b/l_b) Σ_{i∈M_b} −log softmax(W h_i)[x_i]

    A masked token sees the visible tokens of its block and all clean tokens of the document's earlier blocks. One pass
    over a noisy copy and a clean copy of the window computes all blocks. L = 1 is next-token prediction, and L =
    context_length is masked diffusion.

    Args:
        vocab_size: number of tokens in the vocabulary; the mask is the id above it.
        bos_id: the token that begins each document, which is never masked.
        block_length: tokens per block, a divisor of context_length. Blocks restart with each document.
        samples: samples of the bound per window in an evaluation, at least 1.
        order: which masked tokens a pass of decoding reveals; see `MaskedDiffusion`.
        steps: forward passes of decoding per block; None for one per token.

    Raises:
        ConfigError: block_length, samples or steps is below 1.

    Source: Arriola et al., "Block Diffusion", arXiv:2503.09573.
    Differs: exactly l tokens of a block are masked, so that length 1 needs no clipped schedule.
    """

    name: ClassVar = "block"
    extra_tokens: ClassVar = 1
    num_times: ClassVar = 0
    is_bound: ClassVar = True
    scores_last_label: ClassVar = False

    def __init__(
        self,
        *,
        vocab_size: int,
        bos_id: int,
        block_length: int,
        samples: int,
        order: RevealOrder,
        steps: int | None,
    ) -> None:
        check_unmasking(samples=samples, steps=steps)
        if block_length < 1:
            raise ConfigError(f"objective.block_length={block_length}: must be at least 1 token; try 16")
        self.vocab_size, self.bos_id, self.samples = vocab_size, bos_id, samples
        self.block_length, self.steps = block_length, steps
        self.order: RevealOrder = order
        self.sight = Sight("block_pair", block_length)

    def check(self, *, context_length: int) -> None:
        """Raise ConfigError where block_length does not divide context_length."""
        if context_length % self.block_length:
            divisors = [n for n in range(1, context_length + 1) if context_length % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - self.block_length))[:2])
            raise ConfigError(
                f"objective.block_length={self.block_length}: must divide context_length={context_length}; try "
                f"{' or '.join(map(str, near))}"
            )

    def prepare(self, model: Any, batch: Batch, noise: Noise) -> Prepared:
        """Return a copy of the tokens with masks, followed by a clean copy."""
        return self._corrupted(batch, noise, noise.levels(batch["input_ids"].shape[1]))

    def _corrupted(self, batch: Batch, noise: Noise, levels: Float[Tensor, "batch time"]) -> Prepared:
        """Mask by levels: run r of a row, a block of a document, has level r of the row."""
        ids, scored = batch["input_ids"], scored_tokens(batch, self.bos_id)
        runs = block_runs(batch, self.block_length)
        counts = torch.zeros_like(ids).scatter_add(1, runs, scored.long()).gather(1, runs)
        masked_counts = (1 + (levels.gather(1, runs) * counts).long()).minimum(counts)
        masked = lowest_of_runs(noise.uniform(ids.shape[1], stream=MASKS), scored, runs, masked_counts)
        noisy = ids.masked_fill(masked, self.vocab_size)
        inputs = {
            "input_ids": torch.cat([noisy, ids], 1),
            "positions": batch["positions"].repeat(1, 2),
            "document_ids": batch["document_ids"].repeat(1, 2),
            "sight": self.sight,
        }
        weights = counts.double() / masked_counts.clamp_min(1)
        labels = ids.masked_fill(~masked, IGNORED_LABEL)
        return Prepared(inputs, {"labels": labels, "weights": weights, "num_labels": label_count(batch)})

    def loss(
        self, model: Any, run: Callable[..., Any], prepared: Prepared, out: Any, share: LossShare
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the weighted cross-entropy of the masked tokens per label of the update, bos labels included."""
        return weighted_loss(model, noisy_half(out.hidden), prepared, share), {}

    def validation_nll(self, model: Any, run: Callable[..., Any], batch: Batch, noise: Noise) -> TokenNLL:
        """Return one sample of the bound."""
        return self.token_nll(model, run, batch, noise, sample=0, samples=1)

    @torch.no_grad()
    def token_nll(
        self, model: Any, run: Callable[..., Any], batch: Batch, noise: Noise, *, sample: int, samples: int
    ) -> TokenNLL:
        """Return a sample of the bound whose levels lie in the given one of `samples` equal ranges."""
        levels = (sample + noise.levels(batch["input_ids"].shape[1])) / samples
        prepared = self._corrupted(batch, noise, levels)
        hidden, targets = noisy_half(run(**prepared.inputs).hidden), prepared.targets
        nats = model.loss(hidden, targets["labels"], reduction="none", weights=targets["weights"])
        return TokenNLL(nats, batch["input_ids"].masked_fill(~scored_tokens(batch, self.bos_id), IGNORED_LABEL))

    def decode(
        self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, steps: int | None, **sampling: Any
    ) -> BlockText:
        """Return the tokens, block by block; `steps` counts passes per block. See `BlockText`."""
        return BlockText(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            steps=self.steps if steps is None else steps,
            block_length=self.block_length,
            order=self.order,
            bos_id=self.bos_id,
            **sampling,
        )

    def flops_per_token(self, model: Any, context_length: int) -> float:
        """Return the FLOPs of one pass over both copies, of which the head reads one."""
        return model.flops_per_token(context_length, self.sight)


def noisy_half(hidden: Float[Tensor, "batch pair d_model"]) -> Float[Tensor, "batch time d_model"]:
    """Return the hidden states of the noisy copy."""
    return hidden[:, : hidden.shape[1] // 2]


def block_runs(batch: Batch, block_length: int) -> Int[Tensor, "batch time"]:
    """Return the number of each token's run along its row: a run is a block of one document."""
    blocks, ids = batch["positions"] // block_length, batch["document_ids"]
    starts = torch.zeros_like(ids)
    starts[:, 1:] = (blocks[:, 1:] != blocks[:, :-1]) | (ids[:, 1:] != ids[:, :-1])
    return starts.cumsum(1)


def lowest_of_runs(
    values: Float[Tensor, "batch time"],
    scored: Bool[Tensor, "batch time"],
    runs: Int[Tensor, "batch time"],
    counts: Int[Tensor, "batch time"],
) -> Bool[Tensor, "batch time"]:
    """Return the places of the `counts` lowest values of each run among its scored ones, by one sort per row."""
    keys = runs + torch.where(scored, values / 2, 0.75)
    ranks = keys.argsort(1).argsort(1)
    sizes = torch.zeros_like(runs).scatter_add(1, runs, torch.ones_like(runs))
    before = sizes.cumsum(1) - sizes
    return scored & (ranks - before.gather(1, runs) < counts)
