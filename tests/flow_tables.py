"""A denoiser that knows the joint distribution of two tokens exactly."""

import torch
from torch import nn

from llm.model.transformer import TransformerOutput

SYMBOLS, FLOW_BOS = 4, 4


class ExactDenoiser(nn.Module):
    """Predicts each of the tokens 1 and 2 of a window from the noisy vector of the other, by Bayes' rule."""

    vocab_size, d_model = SYMBOLS + 1, 4

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        weights = torch.rand(SYMBOLS, SYMBOLS, generator=generator, dtype=torch.float64) ** 2
        self.joint = weights / weights.sum()
        self.token_embedding = nn.Embedding(self.vocab_size, self.d_model, dtype=torch.float64)
        with torch.no_grad():
            self.token_embedding.weight.copy_(torch.randn(self.vocab_size, self.d_model, generator=generator))

    @property
    def table(self) -> torch.Tensor:
        """The normalized vectors, by their definition."""
        weight = self.token_embedding.weight.detach()
        return weight / weight.norm(dim=1, keepdim=True) * self.d_model**0.5

    def entropy(self) -> float:
        """Return the entropy of the joint in nats."""
        return -float((self.joint * self.joint.log()).sum())

    def forward(self, input_ids=None, *, embedded, positions, document_ids, times, sight) -> TransformerOutput:
        snr = times.double().exp()
        # log q(z | v) up to a constant; the norm of all e_v is the same
        evidence = (snr.sqrt() * (1 + snr).sqrt() * embedded @ self.table.T)[..., :SYMBOLS]
        hidden = torch.full((*embedded.shape[:2], self.vocab_size), -torch.inf, dtype=torch.float64)
        hidden[:, 0, 0] = 0.0
        hidden[:, 1, :SYMBOLS] = torch.logsumexp(self.joint.log() + evidence[:, 2, None, :], 2)
        hidden[:, 2, :SYMBOLS] = torch.logsumexp(self.joint.log().T + evidence[:, 1, None, :], 2)
        return TransformerOutput(hidden, {}, {})

    def logits(self, hidden):
        """Return the scores themselves."""
        return hidden

    def rule_loss(self, hidden, rule, *per_token):
        """Apply a rule to the scores themselves."""
        losses = rule(hidden.flatten(0, 1), *(value.flatten(0, 1) for value in per_token))
        return losses.sum(), losses.view(hidden.shape[:2])

    def pairs(self, rows: int) -> torch.Tensor:
        """Return tokens drawn from the joint, behind a bos token."""
        drawn = torch.multinomial(self.joint.flatten(), rows, True, generator=torch.Generator().manual_seed(7))
        return torch.stack([torch.full_like(drawn, FLOW_BOS), drawn // SYMBOLS, drawn % SYMBOLS], 1)
