"""Weights of a Hugging Face folder as the weights of a decoder that computes the same."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.errors import CheckpointError, ConfigError
from llm.huggingface.families import find_family
from llm.huggingface.folder import read_config, read_weights
from llm.huggingface.names import to_ours
from llm.model.transformer import Transformer
from llm.run_folder.checkpoint import compare_state

MODEL_TYPES = ("llama", "mistral", "qwen3", "mixtral", "qwen3_moe", "glm4_moe")

OVERRIDES = {
    "hidden_size": "model.d_model",
    "num_hidden_layers": "model.num_layers",
    "num_attention_heads": "model.num_heads",
    "num_key_value_heads": "model.num_kv_heads",
    "head_dim": "model.head_dim",
    "tie_word_embeddings": "model.tie_embeddings",
    "rms_norm_eps": "model.norm.eps",
    "rope_theta": "model.position.base",
    "sliding_window": "model.attention.window",
    "num_experts_per_tok": "model.ffn.top_k",
    "routed_scaling_factor": "model.ffn.router.routed_scale",
    "norm_topk_prob": "model.ffn.router.normalize",
    "num_experts": "model.ffn.num_experts",
    "num_local_experts": "model.ffn.num_experts",
    "n_routed_experts": "model.ffn.num_experts",
    "n_shared_experts": "model.ffn.num_shared_experts",
    "first_k_dense_replace": "model.first_ffn_layers",
    "intermediate_size": "model.ffn.d_ff",
    "moe_intermediate_size": "model.ffn.d_ff (with model.ffn.match=none)",
}
"""Their settings that change what is computed, and the key that sets each here."""

log = logging.getLogger(__name__)


def load_hf_weights(folder: Path, model: Transformer, *, context_length: int, bos_id: int) -> dict[str, Tensor]:
    """Return the weights of a Hugging Face folder for `model`, in fp32.

    Rows of the embedding beyond the vocabulary, with which models are padded, are left out with a notice.

    Args:
        folder: with config.json and safetensors.
        model: the decoder that will take them; it must compute what the folder's model does.
        context_length: of the run.
        bos_id: of the run's tokenizer.

    Raises:
        CheckpointError: another architecture; the message lists the settings under which it would fit.
        ConfigError: `model` is of a kind that Hugging Face has no class for.
    """
    config = normalized(read_config(folder))
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"init_from={folder}: its model_type is {model_type}; only {', '.join(MODEL_TYPES)} have a decoder here"
        )
    try:
        family = find_family(model, context_length=context_length, bos_id=bos_id)
    except ConfigError as error:
        reason = str(error).split("(", 1)[1].rsplit(")", 1)[0]
        raise CheckpointError(
            f"init_from={folder}: holds a {model_type}, and this decoder is of a kind that Hugging Face has no class "
            f"for ({reason}); change model.*"
        ) from error
    _compare_settings(folder, config, normalized(family.config))
    theirs = read_weights(folder)
    _cut_padding(theirs, model.vocab_size)
    state, left_over = to_ours(theirs, model.state_dict(), model_type)
    left_over = {name for name in left_over if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight"}
    if left_over:
        names = ", ".join(sorted(left_over)[:4])
        raise CheckpointError(
            f"init_from={folder}: {len(left_over)} weights have no place here ({names}); change model.*"
        )
    compare_state(state, model.state_dict(), source=f"init_from={folder}")
    return {name: tensor.float() for name, tensor in state.items()}


def normalized(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with what older and newer files say in different places in one place."""
    config = dict(config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    config["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    config["rope_theta"] = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    heads = config.get("num_attention_heads")
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    if config.get("head_dim") is None and heads:
        config["head_dim"] = config.get("hidden_size", 0) // heads
    config.setdefault("tie_word_embeddings", False)
    if config.get("use_sliding_window") is False:
        config["sliding_window"] = None
    return config


def _compare_settings(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    problems = [*_refusals(theirs)]
    if theirs["model_type"] != ours["model_type"]:
        problems.append(f"its model_type is {theirs['model_type']}, this decoder would be a {ours['model_type']}")
        problems += [hint for kind, hint in HINTS.items() if kind == theirs["model_type"]]
    for key, override in OVERRIDES.items():
        given, wanted = ours.get(key), theirs.get(key)
        if wanted is not None and given is not None and wanted != given:
            problems.append(f"{override} is {given}, there it is {wanted}")
    if bool(theirs.get("sliding_window")) != bool(ours.get("sliding_window")):
        problems.append(f"model.attention.window is {ours.get('sliding_window')}, there {theirs.get('sliding_window')}")
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(f"init_from={folder}: made by another architecture; change these:\n  {listed}")


HINTS = {
    "llama": "a llama has model.attention.qk_norm=false and no experts",
    "mistral": "a mistral has model.attention.window set and model.attention.qk_norm=false",
    "qwen3": "a qwen3 has model.attention.qk_norm=true and no experts",
    "mixtral": "a mixtral has model=moe model/ffn/router=softmax model.ffn.router.normalize=true and no selection bias",
    "qwen3_moe": "a qwen3_moe has model=moe model/ffn/router=softmax model.attention.qk_norm=true",
    "glm4_moe": "a glm4_moe has model=moe model/ffn/router=sigmoid",
}


def _refusals(theirs: Mapping[str, Any]) -> Iterator[str]:
    if theirs["rope_type"] != "default":
        yield f"it scales positions (rope_type={theirs['rope_type']}), which no position here does alike"
    if theirs.get("attention_bias") or theirs.get("mlp_bias"):
        yield "its projections have biases, which none here has"
    if theirs.get("hidden_act", "silu") != "silu":
        yield f"its feed-forward uses {theirs['hidden_act']}, here it is silu"


def _cut_padding(weights: dict[str, Tensor], vocab_size: int) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = weights[name].shape[0] if name in weights else 0
        if rows > vocab_size:
            log.info("%s: the %d rows beyond the vocabulary of %d are left out", name, rows - vocab_size, vocab_size)
            weights[name] = torch.narrow_copy(weights[name], 0, 0, vocab_size)
