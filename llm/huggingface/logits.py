"""Verifies that a decoder equals its Hugging Face folder, by the logits of `transformers`."""

import importlib.util
import logging
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from llm.errors import CheckpointError
from llm.model.transformer import Transformer

TOLERANCE = 1e-4
"""Largest difference of logits, in fp32, at which two models count as equal."""

MAX_LENGTH = 256
"""Most tokens per window in the comparison at import, which bounds its time for large models."""

log = logging.getLogger(__name__)


def has_transformers() -> bool:
    """Return whether `transformers`, an optional dependency, is installed."""
    return importlib.util.find_spec("transformers") is not None


def random_windows(
    *, tokens: int, context_length: int, vocab_size: int, bos_id: int
) -> Int[Tensor, "windows context_length"]:
    """Return windows of random ids with about `tokens` tokens in total; each begins a document."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (max(1, tokens // context_length), context_length), generator=generator)
    ids[:, 0] = bos_id
    return ids


@torch.no_grad()
def compare_logits(model: Transformer, folder: Path, ids: Int[Tensor, "windows time"]) -> float:
    """Return the largest difference between the logits of `model` and of the folder in `transformers`, in fp32."""
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]
    from transformers.utils import logging as their_logging  # pyright: ignore[reportMissingImports]

    their_logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    worst = 0.0
    for row, places in zip(ids.split(1), positions.split(1), strict=True):
        ours = model.logits(model(row, positions=places).hidden)
        expected = theirs(input_ids=row).logits[..., : model.vocab_size]
        worst = max(worst, float((expected - ours).abs().max()))
    return worst


def check_import(folder: Path, model: Transformer, *, context_length: int, bos_id: int) -> None:
    """Compare a decoder that has loaded a folder's weights with the folder's own model, if `transformers` is there.

    The tolerance grows with logits above 1, as rounding does: published models have logits of 10 to 40.

    Raises:
        CheckpointError: their logits differ, so that a setting or a weight has another meaning here.
    """
    if not has_transformers():
        log.info("%s: logits are not compared, since transformers is not installed; pip install '.[eval]'", folder)
        return
    length, was_training = min(context_length, MAX_LENGTH), model.training
    ids = random_windows(tokens=2 * length, context_length=length, vocab_size=model.vocab_size, bos_id=bos_id)
    try:
        difference = compare_logits(model.eval(), folder, ids)
        with torch.no_grad():
            positions = torch.arange(length)[None]
            largest = float(model.logits(model(ids[:1], positions=positions).hidden).abs().max())
    finally:
        model.train(was_training)
    tolerance = TOLERANCE * max(1.0, largest)
    if not difference <= tolerance:
        raise CheckpointError(
            f"init_from={folder}: its logits in transformers differ from those here by {difference:.2e}, more than "
            f"{tolerance:.2g}; report the folder's config.json as a bug"
        )
    log.info("compared     %d tokens with transformers, largest difference of logits %.2e", ids.numel(), difference)
