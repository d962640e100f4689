"""Completes a config.json with its class's defaults, in one form that two configurations can be compared in."""

from collections.abc import Mapping
from typing import Any

from llm.huggingface.rotary_settings import rope_settings

ANY_DECODER = {
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        **ANY_DECODER,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,
        "mlp_bias": False,
    },
    "mistral": {**ANY_DECODER, "intermediate_size": 14336, "sliding_window": 4096},
    "qwen2": {
        **{key: value for key, value in ANY_DECODER.items() if key != "attention_bias"},
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        **ANY_DECODER,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "mixtral": {
        **ANY_DECODER,
        "intermediate_size": 14336,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        **ANY_DECODER,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 32768,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    "glm4_moe": {
        **ANY_DECODER,
        "intermediate_size": 10944,
        "rms_norm_eps": 1e-5,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "partial_rotary_factor": 0.5,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
    },
}
"""Values that the class of each model type takes for keys that config.json does not have.

Only keys that change what is computed are listed. Source: the configuration classes of transformers 5.24.
"""

HARMLESS = frozenset({
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "name_or_path", "use_cache",
    "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
    "decoder_start_token_id", "initializer_range", "attention_dropout", "hidden_dropout", "router_aux_loss_coef",
    "router_jitter_noise", "output_router_logits", "output_hidden_states", "output_attentions", "return_dict",
    "return_dict_in_generate", "output_scores", "use_return_dict", "id2label", "label2id", "problem_type",
    "finetuning_task", "task_specific_params", "chunk_size_feed_forward", "pretraining_tp",
    "num_nextn_predict_layers", "num_mtp_layers", "_attn_implementation", "attn_implementation",
    "_attn_implementation_autoset", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "prefix",
    "suppress_tokens", "exponential_decay_length_penalty", "begin_suppress_tokens", "tokenizer_class",
    "torchscript", "tf_legacy_loss", "pruned_heads", "use_bfloat16", "tie_encoder_decoder", "is_encoder_decoder",
    "is_decoder", "add_cross_attention", "cross_attention_hidden_size", "unsloth_fixed", "unsloth_version",
})  # fmt: skip
"""Keys that change no logits in evaluation: token ids, training, generation, bookkeeping of the library."""

_ALIASES = {
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "glm4_moe": {"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"},
}
_ROPE_KEYS = (
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings",
    "max_position_embeddings",
)  # fmt: skip
_WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_DENSE_KEYS = ("first_k_dense_replace", "mlp_only_layers", "decoder_sparse_step")


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting that changes the computation, with absent keys at their class's defaults.

    Settings that several keys express together become one: `layer_windows`, `dense_layers`, `expert_groups` and those
    of the rotary position.
    """
    model_type = config["model_type"]
    aliases = _ALIASES.get(model_type, {})
    given = {aliases.get(key, key): value for key, value in config.items() if key not in HARMLESS}
    known = DEFAULTS[model_type]
    given = known | {key: value for key, value in given.items() if key in known or value not in (None, False)}
    settings = {key: v for key, v in given.items() if key not in (*_ROPE_KEYS, *_WINDOW_KEYS, *_DENSE_KEYS)}
    settings |= rope_settings(given, default_base=known["rope_theta"])
    settings["layer_windows"] = _merged(_layer_windows(given))
    heads = given["num_attention_heads"]
    settings["num_key_value_heads"] = given["num_key_value_heads"] or heads
    settings["attention_bias"] = _bias(model_type, given)
    settings["head_dim"] = given.get("head_dim") or given["hidden_size"] // heads
    turning = int(settings["head_dim"] * settings["partial_rotary_factor"])  # rounded down, as transformers does
    settings["partial_rotary_factor"] = turning / settings["head_dim"]
    settings["hidden_act"] = "silu" if given["hidden_act"] == "swish" else given["hidden_act"]
    if model_type in ("qwen3_moe", "glm4_moe"):
        settings |= _expert_settings(settings, _dense_layers(given))
    if model_type == "mistral" and settings["layer_windows"] is None:  # computes what a llama computes
        settings |= {"model_type": "llama", "mlp_bias": False}
    return settings


def _bias(model_type: str, given: Mapping[str, Any]) -> str:
    """Return the projections with a bias, as `model.attention.bias` names them."""
    if model_type == "qwen2":
        return "qkv"
    if not given.get("attention_bias"):
        return "none"
    return "qkv" if model_type == "glm4_moe" else "all"


def _layer_windows(given: Mapping[str, Any]) -> list[int | None]:
    """Return the attention window of each layer; None sees all keys."""
    layers, window = range(given["num_hidden_layers"]), given.get("sliding_window")
    if not given.get("use_sliding_window", True):
        window = None
    if given["model_type"] not in ("qwen2", "qwen3"):
        return [window for _ in layers]
    kinds = given.get("layer_types")
    if kinds is None:
        return [window if layer >= given["max_window_layers"] else None for layer in layers]
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _dense_layers(given: Mapping[str, Any]) -> list[int]:
    """Return the layers of a mixture of experts that are dense."""
    layers = range(given["num_hidden_layers"])
    if given["model_type"] == "glm4_moe":
        return list(layers)[: given["first_k_dense_replace"]]
    step, listed = given["decoder_sparse_step"], given["mlp_only_layers"] or []
    return [layer for layer in layers if layer in listed or (layer + 1) % step]


def _expert_settings(settings: dict[str, Any], dense: list[int]) -> dict[str, Any]:
    """Return settings of dense layers and expert groups; a width or a grouping that nothing uses is None."""
    groups, chosen = settings.pop("n_group", 1), settings.pop("topk_group", 1)
    is_prefix = dense == list(range(len(dense)))
    return {
        "dense_layers": len(dense) if is_prefix else dense,
        "intermediate_size": settings["intermediate_size"] if dense else None,
        "expert_groups": None if chosen >= groups else f"{chosen} of {groups}",
    }


def _merged(values: list[int | None]) -> Any:
    """Return the one value that all layers have, or the list of values."""
    return values[0] if len(set(values)) == 1 else values
