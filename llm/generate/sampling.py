"""Draws the next token from logits: repetition penalty, temperature, top k and nucleus."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.errors import ConfigError


def filter_logits(
    logits: Float[Tensor, "batch vocab"], *, temperature: float, top_k: int | None, top_p: float | None
) -> Float[Tensor, "batch vocab"]:
    """Divide logits by the temperature, then set those outside the top k and outside the nucleus to −inf.

    Args:
        logits: scores of the next token.
        temperature: above 0; below 1 sharpens.
        top_k: number of highest logits to keep, or None for all.
        top_p: keep the fewest tokens whose probabilities sum to at least p, one or more; None keeps all.

    Source: nucleus sampling of Holtzman et al., arXiv:1904.09751, eq. 2-3.
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def penalize_repetition(
    logits: Float[Tensor, "batch vocab"], ids: Int[Tensor, "batch time"], penalty: float
) -> Float[Tensor, "batch vocab"]:
    """Lower the logits of tokens that have occurred: x / penalty where x > 0, x · penalty where x < 0.

    Args:
        logits: scores of the next token.
        ids: the tokens so far, those of the prompt included; −1 marks padding.
        penalty: above 0; 1 changes nothing, and 1.1 to 1.3 are usual.

    Source: Keskar et al., "CTRL", arXiv:1909.05858, section 4.1. Differs: negative scores are multiplied, as in
    `transformers`, since division would make their tokens more likely.
    """
    if penalty == 1.0:
        return logits
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids.clamp_min(0), ids >= 0)
    # padding writes to column 0 and may have erased the mark of a real token there
    seen[:, 0] = (ids == 0).any(1)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample_token(
    logits: Float[Tensor, "batch vocab"],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Int[Tensor, " batch"]:
    """Draw the next token; at temperature 0 take the highest logit.

    The draw is argmax(logits + Gumbel noise). The noise is made on the CPU, so that a seed fixes the text.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    gumbel = -(-uniform.log()).log()
    return (logits.double() + gumbel.to(logits.device)).argmax(-1)


def check_sampling(
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float = 1.0,
    steps: int | None = None,
) -> None:
    """Raise ConfigError for a sampling setting outside its range."""
    if steps is not None and steps < 1:
        raise ConfigError(f"steps={steps}: must be at least 1 forward pass; null takes the objective's own number")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: must be at least 1; try 128")
    if not temperature >= 0:
        raise ConfigError(f"temperature={temperature}: must be at least 0, which is greedy; try 0.8")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k}: must be at least 1; null keeps all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p}: must lie in (0, 1]; null keeps all tokens")
    if not 0 < repetition_penalty < float("inf"):
        raise ConfigError(f"repetition_penalty={repetition_penalty}: must be above 0; 1 changes nothing, try 1.2")
