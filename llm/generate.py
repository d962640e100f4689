"""Text out of a decoder: sampling from its scores, with a cache so that each token is read once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.errors import ConfigError

PADDING_DOCUMENT = -1
"""Document id of the padding to the left of a short prompt: attention never crosses documents."""


def filter_logits(
    logits: Float[Tensor, "batch vocab"], *, temperature: float, top_k: int | None, top_p: float | None
) -> Float[Tensor, "batch vocab"]:
    """Divide by the temperature, then put −inf on what lies outside the top k and outside the nucleus.

    Args:
        logits: scores of the next token.
        temperature: above 0; below 1 sharpens.
        top_k: keep the k highest, or None.
        top_p: keep the fewest tokens whose probabilities sum to at least p (the first always stays), or None.

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


def sample_token(
    logits: Float[Tensor, "batch vocab"],
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Int[Tensor, " batch"]:
    """Draw the next token; a temperature of 0 takes the highest score.

    The draw is argmax(logits + Gumbel noise) with noise from the CPU, so that a seed gives the same text on any device.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    gumbel = -(-uniform.log()).log()
    return (logits.double() + gumbel.to(logits.device)).argmax(-1)


def check_sampling(*, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ConfigError for a sampling setting out of its range."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: must be at least 1; try 128")
    if temperature < 0:
        raise ConfigError(f"temperature={temperature}: must be at least 0, which is greedy; try 0.8")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k}: must be at least 1; null keeps all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p}: must lie in (0, 1]; null keeps all tokens")


@torch.inference_mode()
def stream_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    use_cache: bool = True,
) -> Iterator[Int[Tensor, " batch"]]:
    """Yield the next token of every prompt, max_new_tokens times.

    Prompts of different lengths are padded to the left with a document of their own, which no real token sees.

    Args:
        model: a decoder with `new_caches` and `logits`.
        prompts: token ids, at least one each.
        max_new_tokens: how many tokens to draw for each prompt.
        temperature: 0 is greedy.
        top_k: see `filter_logits`.
        top_p: see `filter_logits`.
        seed: of the draw.
        use_cache: read each token once; without it the whole text is read again for every token (the definition).

    Raises:
        ConfigError: a setting out of range, or an empty prompt.
    """
    check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    device = next(model.parameters()).device
    ids, positions, documents = _pad_left(prompts, device)
    generator = torch.Generator().manual_seed(seed)
    caches = _new_caches(model, ids, max_new_tokens) if use_cache else None
    fresh = (ids, positions, documents)
    for _ in range(max_new_tokens):
        hidden = model(fresh[0], positions=fresh[1], document_ids=fresh[2], caches=caches).hidden
        logits = model.logits(hidden[:, -1:])[:, 0]
        token = sample_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        yield token
        step = (token[:, None], positions[:, -1:] + 1, documents[:, -1:])
        positions, documents = torch.cat([positions, step[1]], 1), torch.cat([documents, step[2]], 1)
        ids = torch.cat([ids, step[0]], 1)
        fresh = step if use_cache else (ids, positions, documents)


def _new_caches(model: Any, ids: Tensor, max_new_tokens: int) -> list[Any]:
    kind = ids.device.type
    weights = next(model.parameters()).dtype
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights
    return model.new_caches(batch=ids.shape[0], max_length=ids.shape[1] + max_new_tokens, dtype=dtype)


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
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


def generate_text(model: Any, prompts: Sequence[str], *, tokenizer: Any, **sampling: Any) -> list[str]:
    """Continue each prompt until the tokenizer's bos token, which ends a document, or max_new_tokens.

    Args:
        model: a decoder; left in the mode it was in.
        prompts: texts; an empty one starts a document.
        tokenizer: with `bos_id`, `encode_batch` and `decode`.
        sampling: see `stream_tokens`.
    """
    was_training = model.training
    model.eval()
    try:
        encoded = [[tokenizer.bos_id, *map(int, ids)] for ids in tokenizer.encode_batch(list(prompts))]
        columns = [token.tolist() for token in stream_tokens(model, encoded, **sampling)]
    finally:
        model.train(was_training)
    texts = []
    for prompt, drawn in zip(prompts, zip(*columns, strict=True), strict=True):
        end = drawn.index(tokenizer.bos_id) if tokenizer.bos_id in drawn else len(drawn)
        texts.append(prompt + tokenizer.decode(list(drawn[:end])))
    return texts
