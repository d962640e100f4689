"""Next-token prediction: each token is predicted from those before it."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from llm.contracts import CAUSAL, Batch, LossShare, Noise, Prepared, Sight, TokenNLL
from llm.errors import ConfigError
from llm.generate.decode import Decoding
from llm.objective.scoring import nll_without, shared_labels


class NextToken:
    """The cross-entropy of each token given all tokens before it: −log p(x) = −Σ_i log softmax(W h_{i−1})[x_i].

    Args:
        vocab_size: number of tokens in the vocabulary.
        bos_id: the token that begins each document.
    """

    name: ClassVar = "next_token"
    extra_tokens: ClassVar = 0
    num_times: ClassVar = 0
    is_bound: ClassVar = False
    scores_last_label: ClassVar = True

    def __init__(self, *, vocab_size: int, bos_id: int) -> None:
        self.vocab_size, self.bos_id = vocab_size, bos_id
        self.sight: Sight = CAUSAL
        self.samples = 1

    def check(self, *, context_length: int) -> None:
        """Accept every window length."""

    def prepare(self, model: Any, batch: Batch, noise: Noise) -> Prepared:
        """Return the tokens as they are."""
        inputs = {key: batch[key] for key in ("input_ids", "positions", "document_ids")}
        return Prepared(inputs=inputs, targets={"labels": batch["labels"]})

    def loss(
        self, model: Any, run: Callable[..., Any], prepared: Prepared, out: Any, share: LossShare
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the cross-entropy per label of the update.

            loss of a micro-batch = Σ nll · num_parts / num_labels

        The trainer averages over micro-batches and the strategy over ranks. A mean per micro-batch would give the
        labels of a micro-batch with few of them a larger weight, so that accumulation would change the gradient. Where
        every label has a loss, the mean per micro-batch is the same.
        """
        labels = prepared.targets["labels"]
        if share.num_labels is None:
            return model.loss(out.hidden, labels), {}
        total = model.loss(out.hidden, labels, reduction="sum")
        return total * (share.num_parts / max(1, share.num_labels)), {}

    @torch.no_grad()
    def validation_nll(self, model: Any, run: Callable[..., Any], batch: Batch, noise: Noise) -> TokenNLL:
        """Return the loss of every label."""
        prepared = self.prepare(model, batch, noise)
        losses = model.loss(run(**prepared.inputs).hidden, batch["labels"], reduction="none")
        return TokenNLL(losses, batch["labels"])

    @torch.no_grad()
    def token_nll(
        self, model: Any, run: Callable[..., Any], batch: Batch, noise: Noise, *, sample: int, samples: int
    ) -> TokenNLL:
        """Return the losses of the tokens that every objective scores, where bos has probability 0.

        Other objectives know the lengths of documents. Without bos, the result is a distribution over texts of given
        lengths as well, so that the figures compare.
        """
        labels = shared_labels(batch, self.bos_id)
        hidden = run(**self.prepare(model, batch, noise).inputs).hidden
        return TokenNLL(nll_without(model, hidden, labels, banned_id=self.bos_id), labels)

    def decode(
        self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, steps: int | None, **sampling: Any
    ) -> Decoding:
        """Return the tokens, one per pass; see `Decoding`.

        Raises:
            ConfigError: steps is set.
        """
        if steps is not None:
            raise ConfigError(f"steps={steps}: objective=next_token takes one pass per token; set steps=null")
        return Decoding(model, prompts, max_new_tokens=max_new_tokens, **sampling)

    def flops_per_token(self, model: Any, context_length: int) -> float:
        """Return the FLOPs of one causal forward pass."""
        return model.flops_per_token(context_length)
