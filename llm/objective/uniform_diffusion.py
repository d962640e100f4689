"""Uniform diffusion: random tokens replace some of the text, and every token is predicted from the others."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import BIDIRECTIONAL, IGNORED_LABEL, Batch, LossShare, Noise, Prepared, Sight, TokenNLL
from llm.objective.scoring import label_count, per_label, scored_tokens
from llm.objective.uniform_text import CLEAN_TIME, UniformText
from llm.objective.unmasking import check_unmasking
from llm.ops.noise import MASKS, REPLACEMENTS

MARGIN = 1e-3
"""Distance of the lowest and the highest level from 0 and 1, where the loss is singular."""


class UniformDiffusion:
    """A bound of the negative log-likelihood by tokens that are replaced, each with probability t, by random ones.

        z_i = x_i with probability α = 1 − t, else uniform over V tokens;   p = softmax(W h_i),  u_v = 1 + α (V p_v − 1)
        x̄_v = V α · 1[v = x_i] + 1 − α,   r = x̄_v / x̄_z,   r_θ = u_v / u_z
        −log p(x) ≤ ∫₀¹ E Σ_i 1/(V α) Σ_v (r_θ − r − r log(r_θ / r)) dt

    The head predicts a token from all others, its own noisy value excluded. That prediction minimizes the bound, and
    the bound is then tight for every text. The cross-entropy of the posterior, which sees the noisy value, is smaller
    than the bound and no bound itself. Levels lie in [0.001, 0.999].

    Args:
        vocab_size: V, number of tokens in the vocabulary.
        bos_id: the token that begins each document, which is never replaced.
        samples: samples of the bound per window in an evaluation, at least 1.
        steps: forward passes of decoding, at least 1.

    Raises:
        ConfigError: samples or steps is below 1.

    Source: Schiff et al., "UDLM", arXiv:2412.10193; Sahoo et al., "The Diffusion Duality", arXiv:2506.10892, for the
    closed form of the sum.
    """

    name: ClassVar = "uniform"
    extra_tokens: ClassVar = 0
    num_times: ClassVar = 1
    is_bound: ClassVar = True
    scores_last_label: ClassVar = False

    def __init__(self, *, vocab_size: int, bos_id: int, samples: int, steps: int) -> None:
        check_unmasking(samples=samples, steps=steps)
        self.vocab_size, self.bos_id, self.samples, self.steps = vocab_size, bos_id, samples, steps
        self.sight: Sight = BIDIRECTIONAL

    def check(self, *, context_length: int) -> None:
        """Accept every window length."""

    def prepare(self, model: Any, batch: Batch, noise: Noise) -> Prepared:
        """Return the tokens with some replaced by random ones, and the time of each token."""
        return self._corrupted(batch, noise, noise.levels())

    def _corrupted(self, batch: Batch, noise: Noise, levels: Float[Tensor, "batch 1"]) -> Prepared:
        ids, scored = batch["input_ids"], scored_tokens(batch, self.bos_id)
        replaced = MARGIN + (1 - 2 * MARGIN) * levels  # t
        drawn = (noise.uniform(ids.shape[1], stream=REPLACEMENTS) * self.vocab_size).long()
        is_replaced = scored & (noise.uniform(ids.shape[1], stream=MASKS) < replaced)
        noisy = torch.where(is_replaced, drawn, ids)
        kept = (1 - replaced).expand(ids.shape)  # α
        inputs = {
            "input_ids": noisy,
            "positions": batch["positions"],
            "document_ids": batch["document_ids"],
            "times": torch.where(scored, torch.logit(kept), CLEAN_TIME).float()[..., None],
            "sight": self.sight,
        }
        labels = ids.masked_fill(~scored, IGNORED_LABEL)
        targets = {"labels": labels, "noisy": noisy, "kept": kept, "num_labels": label_count(batch)}
        return Prepared(inputs, targets)

    def loss(
        self, model: Any, run: Callable[..., Any], prepared: Prepared, out: Any, share: LossShare
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return one sample of the bound per label of the update, bos labels included."""
        total, _ = self._bound(model, out.hidden, prepared)
        return per_label(total, prepared.targets["num_labels"], share), {}

    def validation_nll(self, model: Any, run: Callable[..., Any], batch: Batch, noise: Noise) -> TokenNLL:
        """Return one sample of the bound."""
        return self.token_nll(model, run, batch, noise, sample=0, samples=1)

    @torch.no_grad()
    def token_nll(
        self, model: Any, run: Callable[..., Any], batch: Batch, noise: Noise, *, sample: int, samples: int
    ) -> TokenNLL:
        """Return a sample of the bound whose level lies in the given one of `samples` equal ranges."""
        prepared = self._corrupted(batch, noise, (sample + noise.levels()) / samples)
        _, nats = self._bound(model, run(**prepared.inputs).hidden, prepared)
        return TokenNLL(nats, prepared.targets["labels"])

    def _bound(self, model: Any, hidden: Tensor, prepared: Prepared) -> tuple[Tensor, Tensor]:
        targets = prepared.targets
        return model.rule_loss(hidden, integrand, targets["labels"], targets["noisy"], targets["kept"])

    def decode(
        self, model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, steps: int | None, **sampling: Any
    ) -> UniformText:
        """Return the tokens, which all appear after the last pass; see `UniformText`."""
        passes = self.steps if steps is None else steps
        return UniformText(
            model, prompts, max_new_tokens=max_new_tokens, steps=passes, margin=MARGIN, bos_id=self.bos_id, **sampling
        )

    def flops_per_token(self, model: Any, context_length: int) -> float:
        """Return the FLOPs of one two-sided forward pass."""
        return model.flops_per_token(context_length, self.sight)


def integrand(
    scores: Float[Tensor, "tokens vocab"],
    labels: Int[Tensor, " tokens"],
    noisy: Int[Tensor, " tokens"],
    kept: Float[Tensor, " tokens"],
) -> Float[Tensor, " tokens"]:
    """Return the integrand of the bound per token, 0 where a label is ignored.

        1/(V α) · [V/u_z − V/x̄_z − Σ_v r log r_θ + Σ_v r log r]
        Σ_v r log r_θ = [(1−α) Σ_v log u_v + V α log u_x]/x̄_z − (V/x̄_z) log u_z
        Σ_v r log r   = [(V−1)(1−α) log(1−α) + (V α + 1−α) log(V α + 1−α)]/x̄_z − (V/x̄_z) log x̄_z

    Args:
        scores: predictions from all other tokens, in at least fp32.
        labels: the clean tokens x.
        noisy: the noisy tokens z.
        kept: α.
    """
    size, kept = scores.shape[-1], kept.to(scores.dtype)
    is_ignored = labels == IGNORED_LABEL
    clean, lost, gain = labels.masked_fill(is_ignored, 0), 1 - kept, size * kept
    log_u = torch.log1p(kept[:, None] * (size * scores.softmax(-1) - 1))
    log_u_clean, log_u_noisy = (log_u.gather(1, ids[:, None])[:, 0] for ids in (clean, noisy))
    x_noisy = torch.where(clean == noisy, gain + lost, lost)
    cross = (lost * log_u.sum(-1) + gain * log_u_clean - size * log_u_noisy) / x_noisy
    own = ((size - 1) * lost * lost.log() + (gain + lost) * (gain + lost).log() - size * x_noisy.log()) / x_noisy
    value = (size * (-log_u_noisy).exp() - size / x_noisy - cross + own) / gain
    return value.masked_fill(is_ignored, 0.0)
