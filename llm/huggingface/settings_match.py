"""Compares the settings of a config.json with those of a decoder, and names each difference with its override."""

from collections.abc import Mapping
from typing import Any

from llm.huggingface.defaults import DEFAULTS, complete
from llm.huggingface.rotary_settings import POSITIONS, is_same

OVERRIDES = {
    "hidden_size": "model.d_model",
    "num_hidden_layers": "model.num_layers",
    "num_attention_heads": "model.num_heads",
    "num_key_value_heads": "model.num_kv_heads",
    "head_dim": "model.head_dim",
    "tie_word_embeddings": "model.tie_embeddings",
    "rms_norm_eps": "model.norm.eps",
    "rope_theta": "model.position.base",
    "partial_rotary_factor": "model.position.rotary_share",
    "factor": "model.position.factor",
    "low_freq_factor": "model.position.low_freq_factor",
    "high_freq_factor": "model.position.high_freq_factor",
    "original_context_length": "model.position.original_context_length",
    "beta_fast": "model.position.beta_fast",
    "beta_slow": "model.position.beta_slow",
    "truncate": "model.position.truncate",
    "attention_factor": "model.position.attention_factor",
    "layer_windows": "model.attention.window",
    "use_qk_norm": "model.attention.qk_norm",
    "attention_bias": "model.attention.bias",
    "mlp_bias": "model.ffn.bias",
    "num_experts_per_tok": "model.ffn.top_k",
    "routed_scaling_factor": "model.ffn.router.routed_scale",
    "norm_topk_prob": "model.ffn.router.normalize",
    "num_experts": "model.ffn.num_experts",
    "num_local_experts": "model.ffn.num_experts",
    "n_routed_experts": "model.ffn.num_experts",
    "n_shared_experts": "model.ffn.num_shared_experts",
    "dense_layers": "model.first_ffn_layers",
    "intermediate_size": "model.ffn.d_ff",
    "moe_intermediate_size": "model.ffn.d_ff (with model.ffn.match=none)",
}
"""The key of this project for each setting of config.json."""

HINTS = {
    "llama": "a llama has model.attention.qk_norm=false and no experts",
    "mistral": "a mistral has model.attention.window set and model.attention.qk_norm=false",
    "qwen2": "a qwen2 has model.attention.bias=qkv, model.attention.qk_norm=false and no experts",
    "qwen3": "a qwen3 has model.attention.qk_norm=true and no experts",
    "mixtral": "a mixtral has model=moe model/ffn/router=softmax model.ffn.router.normalize=true and no selection bias",
    "qwen3_moe": "a qwen3_moe has model=moe model/ffn/router=softmax model.attention.qk_norm=true",
    "glm4_moe": "a glm4_moe has model=moe model/ffn/router=sigmoid",
}

REFUSALS = {
    "hidden_act": "its feed-forward uses {value}, and the one here uses silu",
    "partial_rotary_factor": "partial_rotary_factor={value}: its class turns all of each head whatever the factor; "
    "delete the key from config.json",
    "expert_groups": "n_group and topk_group: its router chooses among {value} groups of experts, and no router here "
    "has groups",
}
"""Reasons why a setting of config.json is unsupported."""


def setting_problems(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return one line per setting that makes the two configurations compute different things.

    Every setting counts except those that are known to be harmless, so that an unknown one is refused by its name.
    """
    wanted, given = complete(theirs), complete(ours)
    same_type = wanted["model_type"] == given["model_type"]
    problems = []
    if not same_type:
        problems.append(f"its model_type is {wanted['model_type']}, this decoder would be a {given['model_type']}")
        problems.append(HINTS[wanted["model_type"]])
    for key, value in wanted.items():
        if key == "model_type" or (key in given and is_same(value, given[key])):
            continue
        is_of_class = key in OVERRIDES or value == DEFAULTS[wanted["model_type"]].get(key)
        if key == "partial_rotary_factor" and wanted["model_type"] != "glm4_moe":
            problems.append(REFUSALS[key].format(value=value))
        elif key in given or not is_of_class:  # a key that only their class has is covered by the hint
            problems.append(_difference(key, value, given.get(key)))
    return problems


def _difference(key: str, wanted: Any, given: Any) -> str:
    if key == "rope_type":
        option = POSITIONS.get(wanted)
        if option is None:
            return f"it scales positions by rope_type={wanted}, and no position here does"
        return f"model/position is {POSITIONS.get(given, given)}, there it is {option}"
    if key in OVERRIDES:
        return f"{OVERRIDES[key]} is {given}, there it is {wanted}"
    if key in REFUSALS:
        return REFUSALS[key].format(value=wanted)
    return f"{key}={wanted}: no setting here computes it; delete the key from config.json if it changes no logits"
