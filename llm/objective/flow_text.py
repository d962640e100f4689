"""Draws text by a flow: noise moves along straight steps to the mean embeddings of predicted tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.generate.sampling import sample_token
from llm.objective.gaussian_path import GaussianPath, posterior_scores, token_vectors, vector_table
from llm.objective.whole_text import UNCHANGED, WholeText


class FlowText(WholeText):
    """Prompts that are continued by a fixed number of tokens, which begin as Gaussian noise.

    Each pass predicts p and takes an Euler step of the flow's differential equation from t to t':

        x ← x + (t' − t) / (1 − t) · (ê − x),   ê = Σ_v p_v e_v

    The levels are equal quantiles of those of training. The first pass reads pure noise, t = 0, with the time of the
    lowest level; the last pass draws tokens from p. A bos token is never drawn.

    Args:
        model: the decoder.
        prompts: token ids, at least one per prompt.
        steps: forward passes.
        path: levels of training.
        evidence: whether the evidence of each token's own noisy vector is added to the scores.
        settings: the other arguments of `WholeText`. The settings of sampling change p as `filter_logits` does;
            temperature 0 puts all of p on its likeliest token.

    Raises:
        ConfigError: a setting lies outside its range or has no meaning here, or a prompt is empty.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        steps: int,
        path: GaussianPath,
        evidence: bool,
        **settings: Any,
    ) -> None:
        super().__init__(model, prompts, name="flow", steps=steps, **settings)
        self.path, self.evidence = path, evidence
        self.log_snr = path.quantiles(torch.arange(steps, dtype=torch.float64) / steps)

    def first_tokens(self, rows: int) -> Int[Tensor, "batch new"]:
        """Return places for the tokens, which noisy vectors represent until the last pass."""
        return torch.zeros(rows, self.num_new, dtype=torch.long)

    def draw(self, new: Int[Tensor, "batch new"]) -> None:
        """Take the Euler steps, then draw every token."""
        vectors, table = token_vectors(self.model, self.ids), vector_table(self.model, new.device)
        times = torch.full((*self.ids.shape, 1), self.path.highest, device=new.device)
        x = torch.randn((*new.shape, table.shape[1]), generator=self.generator).to(table)
        levels = [0.0, *torch.sigmoid(self.log_snr[1:] / 2).tolist()]  # t of each pass
        for index, t in enumerate(levels):
            vectors[:, -self.num_new :] = x / ((1 - t) ** 2 + t**2) ** 0.5  # z / √(1 + snr)
            times[:, -self.num_new :] = float(self.log_snr[index])
            states = (t / (1 - t) ** 2) * x  # √snr · z
            prediction = self._predict(vectors, times, states, table)
            if index + 1 == len(levels):
                new.copy_(
                    sample_token(prediction.flatten(0, 1).log(), **UNCHANGED, generator=self.generator).view_as(new)
                )
                return
            mean = prediction.to(table.dtype) @ table
            x = x + (levels[index + 1] - t) / (1 - t) * (mean - x)

    def _predict(
        self,
        vectors: Float[Tensor, "batch time d_model"],
        times: Float[Tensor, "batch time 1"],
        states: Float[Tensor, "batch new d_model"],
        table: Float[Tensor, "vocab d_model"],
    ) -> Float[Tensor, "batch new vocab"]:
        dtype = self.model.token_embedding.weight.dtype
        logits = self.model.logits(self.read(embedded=vectors.to(dtype), times=times)).flatten(0, 1).double()
        scores = posterior_scores(logits, states.flatten(0, 1), table if self.evidence else None)
        return self.prediction(scores).view(*states.shape[:-1], -1)
