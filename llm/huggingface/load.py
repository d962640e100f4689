"""Loads the weights of a Hugging Face folder into a decoder that computes the same."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from llm.errors import CheckpointError
from llm.huggingface.defaults import DEFAULTS
from llm.huggingface.families import NoFamilyError, find_family
from llm.huggingface.hf_folder import read_hf_config, read_weights
from llm.huggingface.names import to_ours
from llm.huggingface.settings_match import setting_problems
from llm.model.added_inputs import with_added
from llm.model.ffn.balance.balance_rule import without_statistics
from llm.model.transformer import Transformer
from llm.run_folder.checkpoint import compare_state

log = logging.getLogger(__name__)


def load_hf_weights(folder: Path, model: Transformer, *, context_length: int, bos_id: int) -> dict[str, Tensor]:
    """Return the weights of a Hugging Face folder for `model`, in fp32, with the model's own statistics of training.

    Rows of the embedding beyond the vocabulary pad its size; they are discarded, and a log line says so.

    Args:
        folder: with config.json and safetensors.
        model: the decoder that will receive the weights; it must compute the same as the folder's model.
        context_length: tokens per window of the run.
        bos_id: the id of the run's tokenizer that begins a document.

    Raises:
        CheckpointError: the folder has another architecture; the message lists the settings that differ.
    """
    config = read_hf_config(folder)
    model_type = config.get("model_type")
    if model_type not in DEFAULTS:
        raise CheckpointError(
            f"init_from={folder}: its model_type is {model_type}; only {', '.join(DEFAULTS)} are read"
        )
    try:
        family = find_family(model, context_length=context_length, bos_id=bos_id)
    except NoFamilyError as error:
        raise CheckpointError(
            f"init_from={folder}: no Hugging Face class computes this decoder ({error.reasons}); change model.*"
        ) from error
    problems = setting_problems(config, family.config)
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(f"init_from={folder}: made by another architecture; change these settings:\n  {listed}")
    theirs = read_weights(folder)
    _cut_padding(theirs, model.vocab_size)
    own = model.state_dict()
    state, unused = to_ours(theirs, own, family.model_type)
    unused = {name for name in unused if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight"}
    if unused:
        names = ", ".join(sorted(unused)[:4])
        raise CheckpointError(f"init_from={folder}: {len(unused)} weights have no place here ({names}); change model.*")
    state = with_added(state, own)
    compare_state(state, without_statistics(own), source=f"init_from={folder}")
    return own | {name: tensor.float() for name, tensor in state.items()}


def _cut_padding(weights: dict[str, Tensor], vocab_size: int) -> None:
    """Discard the rows of embedding and head beyond the vocabulary."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = weights[name].shape[0] if name in weights else 0
        if rows > vocab_size:
            log.info("%s: discarded %d rows beyond the vocabulary of %d", name, rows - vocab_size, vocab_size)
            weights[name] = torch.narrow_copy(weights[name], 0, 0, vocab_size)
