"""A flow from Gaussian noise to embedded tokens, whose velocity is given by a distribution over tokens."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import BIDIRECTIONAL, IGNORED_LABEL, Batch, LossShare, Noise, Prepared, Sight, TokenNLL
from llm.errors import ConfigError
from llm.objective.flow_text import FlowText
from llm.objective.gaussian_path import path_of, posterior_scores, token_vectors, vector_table
from llm.objective.scoring import label_count, per_label, scored_tokens
from llm.objective.unmasking import check_unmasking


class TokenFlow:
    """The cross-entropy of tokens given noisy embeddings of them, and a bound of the negative log-likelihood.

        e_v = √d_model · E_v / ‖E_v‖,   x_t = (1 − t) ε + t e_x,   snr = (t / (1 − t))²,   λ = log snr
        z = x_t / (1 − t) = √snr · e_x + ε
        p = softmax(W h(z / √(1 + snr), λ) + √snr · z·e_v),   ê = Σ_v p_v e_v,   velocity = (ê − x_t) / (1 − t)
        −log p(x) ≤ ½ e^{λ_min} d_model n + ½ ∫ e^λ E ‖e_x − ê‖² dλ + E[−log p_x at λ_max]

    Training averages −log p_x over λ ~ Logistic(loc, scale), which is no bound; validation and evaluation measure the
    bound over n scored tokens. Clean tokens are read as e_x with the time λ_max.

    Args:
        vocab_size: number of tokens in the vocabulary.
        bos_id: the token that begins each document, which is never noisy.
        loc: centre of λ in training; auto for log(log vocab_size / d_model).
        scale: scale of λ in training, above 0.
        evidence: add √snr · z·e_v, what each noisy vector itself says of its token, to the scores.
        samples: samples of the bound per window in an evaluation, at least 1.
        steps: Euler steps of decoding, at least 1.

    Raises:
        ConfigError: loc is not finite, scale is not above 0, or samples or steps is below 1.

    Source: Dieleman et al., "CDCD", arXiv:2211.15089, for the softmax denoiser; Gulrajani and Hashimoto, "Plaid",
    arXiv:2305.18619, and Kingma et al., arXiv:2107.00630, for the bound; LangFlow, arXiv:2604.11748; the straight path
    is that of ReFlow (kexue.fm/archives/9497).
    Differs: the evidence is a constant to the gradient, which reaches the embedding through the decoder's input.
    """

    name: ClassVar = "flow"
    extra_tokens: ClassVar = 0
    num_times: ClassVar = 1
    is_bound: ClassVar = True
    scores_last_label: ClassVar = False

    def __init__(
        self,
        *,
        vocab_size: int,
        bos_id: int,
        loc: float | str,
        scale: float,
        evidence: bool,
        samples: int,
        steps: int,
    ) -> None:
        check_unmasking(samples=samples, steps=steps)
        if loc != "auto" and (isinstance(loc, str) or not math.isfinite(loc)):
            raise ConfigError(f"objective.loc={loc}: must be a finite log snr, or auto for log(log V / d_model)")
        if not (scale > 0 and math.isfinite(scale)):
            raise ConfigError(f"objective.scale={scale}: must be above 0; 1.0 is usual")
        self.vocab_size, self.bos_id, self.samples, self.steps = vocab_size, bos_id, samples, steps
        self.loc, self.scale, self.evidence = loc, scale, evidence
        self.sight: Sight = BIDIRECTIONAL

    def check(self, *, context_length: int) -> None:
        """Accept every window length."""

    def prepare(self, model: Any, batch: Batch, noise: Noise) -> Prepared:
        """Return noisy embeddings and the time of each token."""
        return self._corrupted(model, batch, noise, path_of(model, self.loc, self.scale).quantiles(noise.levels()))

    def _corrupted(self, model: Any, batch: Batch, noise: Noise, log_snr: Float[Tensor, "batch 1"]) -> Prepared:
        ids, scored = batch["input_ids"], scored_tokens(batch, self.bos_id)
        clean = token_vectors(model, ids)
        log_snr = log_snr.expand(ids.shape)
        snr = log_snr.exp()[..., None].to(clean.dtype)
        noisy = snr.sqrt() * clean + noise.normal(*clean.shape[1:])  # z
        dtype = model.token_embedding.weight.dtype
        highest = path_of(model, self.loc, self.scale).highest
        inputs = {
            "embedded": torch.where(scored[..., None], noisy / (1 + snr).sqrt(), clean).to(dtype),
            "positions": batch["positions"],
            "document_ids": batch["document_ids"],
            "times": torch.where(scored, log_snr, highest).float()[..., None].expand(-1, -1, self.num_times),
            "sight": self.sight,
        }
        targets = {
            "labels": ids.masked_fill(~scored, IGNORED_LABEL),
            "states": (snr.sqrt() * noisy).detach(),
            "log_snr": log_snr,
            "num_labels": label_count(batch),
        }
        return Prepared(inputs, targets)

    def loss(
        self, model: Any, run: Callable[..., Any], prepared: Prepared, out: Any, share: LossShare
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the cross-entropy of the noisy tokens per label of the update, bos labels included."""
        total, _ = self._cross_entropy(model, out.hidden, prepared)
        return per_label(total, prepared.targets["num_labels"], share), {}

    def _cross_entropy(self, model: Any, hidden: Tensor, prepared: Prepared) -> tuple[Tensor, Tensor]:
        table = vector_table(model, hidden.device) if self.evidence else None
        rule = partial(posterior_nll, table=table)
        return model.rule_loss(hidden, rule, prepared.targets["labels"], prepared.targets["states"])

    def validation_nll(self, model: Any, run: Callable[..., Any], batch: Batch, noise: Noise) -> TokenNLL:
        """Return one sample of the bound."""
        return self.token_nll(model, run, batch, noise, sample=0, samples=1)

    @torch.no_grad()
    def token_nll(
        self, model: Any, run: Callable[..., Any], batch: Batch, noise: Noise, *, sample: int, samples: int
    ) -> TokenNLL:
        """Return a sample of the bound whose λ lies in the given one of `samples` equal ranges.

        The first sample contains the cross-entropy at λ_max of all of them, which takes a pass of its own.
        """
        path = path_of(model, self.loc, self.scale)
        width = path.highest - path.lowest
        prepared = self._corrupted(model, batch, noise, path.lowest + width * (sample + noise.levels()) / samples)
        labels, states = prepared.targets["labels"], prepared.targets["states"]
        table = vector_table(model, labels.device)
        rule = partial(squared_error, table=table, evidence=self.evidence)
        _, errors = model.rule_loss(run(**prepared.inputs).hidden, rule, labels, states)
        nats = width / 2 * prepared.targets["log_snr"].exp() * errors.double()
        nats = nats + math.exp(path.lowest) * model.d_model / 2 * (labels != IGNORED_LABEL)
        if sample == 0:
            last = self._corrupted(model, batch, noise, torch.full_like(noise.levels(), path.highest))
            nats = nats + samples * self._cross_entropy(model, run(**last.inputs).hidden, last)[1]
        return TokenNLL(nats, labels)

    def decode(
        self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, steps: int | None, **sampling: Any
    ) -> FlowText:
        """Return the tokens, which all appear after the last pass; see `FlowText`."""
        return FlowText(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            steps=self.steps if steps is None else steps,
            path=path_of(model, self.loc, self.scale),
            evidence=self.evidence,
            bos_id=self.bos_id,
            **sampling,
        )

    def flops_per_token(self, model: Any, context_length: int) -> float:
        """Return the FLOPs of one two-sided forward pass and of the evidence."""
        evidence = 2.0 * model.vocab_size * model.d_model if self.evidence else 0.0
        return model.flops_per_token(context_length, self.sight) + evidence


def posterior_nll(
    scores: Float[Tensor, "tokens vocab"],
    labels: Int[Tensor, " tokens"],
    states: Float[Tensor, "tokens d_model"],
    *,
    table: Float[Tensor, "vocab d_model"] | None,
) -> Float[Tensor, " tokens"]:
    """Return −log p_x per token, 0 where a label is ignored; see `posterior_scores`."""
    return F.cross_entropy(
        posterior_scores(scores, states, table), labels, ignore_index=IGNORED_LABEL, reduction="none"
    )


def squared_error(
    scores: Float[Tensor, "tokens vocab"],
    labels: Int[Tensor, " tokens"],
    states: Float[Tensor, "tokens d_model"],
    *,
    table: Float[Tensor, "vocab d_model"],
    evidence: bool,
) -> Float[Tensor, " tokens"]:
    """Return ‖e_x − ê‖² per token, 0 where a label is ignored."""
    vectors = table.to(scores.dtype)
    mean = posterior_scores(scores, states, vectors if evidence else None).softmax(-1) @ vectors
    is_ignored = labels == IGNORED_LABEL
    errors = (vectors[labels.masked_fill(is_ignored, 0)] - mean).square().sum(-1)
    return errors.masked_fill(is_ignored, 0.0)
