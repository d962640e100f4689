"""Masked diffusion: a random subset of the tokens is hidden and predicted from all visible ones."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm.contracts import BIDIRECTIONAL, IGNORED_LABEL, Batch, LossShare, Noise, Prepared, Sight, TokenNLL
from llm.objective.scoring import label_count, scored_tokens, weighted_loss
from llm.objective.unmasking import RevealOrder, UnmaskedText, check_unmasking
from llm.ops.noise import MASKS


class MaskedDiffusion:
    """A bound of the negative log-likelihood by the losses of masked tokens, l of n scored tokens at a time.

        −log p(x) ≤ E_{l ~ U{1..n}} E_{|M| = l} (n/l) Σ_{i∈M} −log softmax(W h_i)[x_i]

    It is the mean over all orders of the any-order next-token loss. Masking exactly l tokens has no singularity at low
    levels and less variance than masking each token with a probability.

    Args:
        vocab_size: number of tokens in the vocabulary; the mask is the id above it.
        bos_id: the token that begins each document, which is never masked.
        samples: samples of the bound per window in an evaluation, at least 1.
        order: which masked tokens a pass of decoding reveals: `random`; `margin`, those with the likeliest best token;
            `confidence`, those whose drawn token is likeliest, which seeks modes instead of sampling.
        steps: forward passes of decoding; None for one per token.

    Raises:
        ConfigError: samples or steps is below 1.

    Source: Sahoo et al., "MDLM", arXiv:2406.07524; Shi et al., "MD4", arXiv:2406.04329; Nie et al., "LLaDA",
    arXiv:2502.09992, whose order is `confidence`.
    """

    name: ClassVar = "masked"
    extra_tokens: ClassVar = 1
    num_times: ClassVar = 0
    is_bound: ClassVar = True
    scores_last_label: ClassVar = False

    def __init__(self, *, vocab_size: int, bos_id: int, samples: int, order: RevealOrder, steps: int | None) -> None:
        check_unmasking(samples=samples, steps=steps)
        self.vocab_size, self.bos_id, self.samples = vocab_size, bos_id, samples
        self.order: RevealOrder = order
        self.steps = steps
        self.sight: Sight = BIDIRECTIONAL

    def check(self, *, context_length: int) -> None:
        """Accept every window length."""

    def prepare(self, model: Any, batch: Batch, noise: Noise) -> Prepared:
        """Return the tokens with a mask in the place of some of them."""
        return self._corrupted(batch, noise, noise.levels())

    def _corrupted(self, batch: Batch, noise: Noise, levels: Float[Tensor, "batch 1"]) -> Prepared:
        ids, scored = batch["input_ids"], scored_tokens(batch, self.bos_id)
        counts = scored.sum(1, keepdim=True)
        masked_counts = (1 + (levels * counts).long()).minimum(counts)
        masked = lowest(noise.uniform(ids.shape[1], stream=MASKS), scored, masked_counts)
        weights = (counts.double() / masked_counts.clamp_min(1)).expand(ids.shape)
        inputs = {
            "input_ids": ids.masked_fill(masked, self.vocab_size),
            "positions": batch["positions"],
            "document_ids": batch["document_ids"],
            "sight": self.sight,
        }
        labels = ids.masked_fill(~masked, IGNORED_LABEL)
        return Prepared(inputs, {"labels": labels, "weights": weights, "num_labels": label_count(batch)})

    def loss(
        self, model: Any, run: Callable[..., Any], prepared: Prepared, out: Any, share: LossShare
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the weighted cross-entropy of the masked tokens per label of the update, bos labels included.

        The divisor does not depend on the noise: divided by the number of masked tokens, the loss would be no bound.
        """
        return weighted_loss(model, out.hidden, prepared, share), {}

    def validation_nll(self, model: Any, run: Callable[..., Any], batch: Batch, noise: Noise) -> TokenNLL:
        """Return one sample of the bound."""
        return self.token_nll(model, run, batch, noise, sample=0, samples=1)

    @torch.no_grad()
    def token_nll(
        self, model: Any, run: Callable[..., Any], batch: Batch, noise: Noise, *, sample: int, samples: int
    ) -> TokenNLL:
        """Return a sample of the bound whose level lies in the given one of `samples` equal ranges."""
        prepared = self._corrupted(batch, noise, (sample + noise.levels()) / samples)
        hidden = run(**prepared.inputs).hidden
        targets, scored = prepared.targets, scored_tokens(batch, self.bos_id)
        nats = model.loss(hidden, targets["labels"], reduction="none", weights=targets["weights"])
        return TokenNLL(nats, batch["input_ids"].masked_fill(~scored, IGNORED_LABEL))

    def decode(
        self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, steps: int | None, **sampling: Any
    ) -> UnmaskedText:
        """Return the tokens, which all appear after the last pass; see `UnmaskedText`."""
        return UnmaskedText(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            steps=self.steps if steps is None else steps,
            order=self.order,
            bos_id=self.bos_id,
            **sampling,
        )

    def flops_per_token(self, model: Any, context_length: int) -> float:
        """Return the FLOPs of one two-sided forward pass."""
        return model.flops_per_token(context_length, self.sight)


def lowest(
    values: Float[Tensor, "batch time"], scored: Bool[Tensor, "batch time"], counts: Int[Tensor, "batch 1"]
) -> Bool[Tensor, "batch time"]:
    """Return the places of the `counts` lowest values of each row among the scored ones."""
    ranks = values.masked_fill(~scored, 2.0).argsort(1).argsort(1)
    return scored & (ranks < counts)
