"""Folders that transformers writes, and what `init_from=` makes of them; docs/adaptation.md shows this table."""

from typing import NamedTuple

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 24, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 1,
    "pad_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
"""Settings of every folder here."""

OVERRIDES = (
    "model.d_model=32", "model.num_layers=3", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn.d_ff=48",
    "model.head_dim=8", "model.tie_embeddings=false", "context_length=24", "batch_tokens=24", "micro_batch_size=1",
    "loader.val_tokens=24",
)  # fmt: skip
"""The same sizes here."""


class Case(NamedTuple):
    """A folder, and the settings that read it or the words of the refusal."""

    model_type: str
    config: dict
    overrides: str = ""
    refusal: str = ""


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 12}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
SCALED = {
    "llama3": "model/position=llama3 model.position.base=10000.0 model.position.factor=4.0 "
    "model.position.original_context_length=16",
    "yarn": "model/position=yarn model.position.factor=2.0 model.position.original_context_length=12",
    "linear": "model/position=linear_scaling model.position.factor=2.0",
}
MOE = "model=moe model.ffn.num_experts=4 model.ffn.top_k=2 model.ffn.match=none"
SOFTMAX = f"{MOE} model/ffn/router=softmax model/ffn/balance=aux_loss"
QK_NORM = "model.attention.qk_norm=true"
EXPERTS = {"num_experts_per_tok": 2}

CASES = [
    Case("llama", {}),
    Case("llama", {"tie_word_embeddings": True}, "model.tie_embeddings=true"),
    Case("llama", {"attention_bias": True}, "model.attention.bias=all"),
    Case("llama", {"mlp_bias": True}, "model.ffn.bias=true"),
    Case("llama", {"rope_parameters": LLAMA3}, SCALED["llama3"]),
    Case("llama", {"rope_parameters": YARN}, SCALED["yarn"]),
    Case("llama", {"rope_parameters": LINEAR}, SCALED["linear"]),
    Case("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
         refusal="it scales positions by rope_type=dynamic"),
    Case("llama", {"hidden_act": "gelu"}, refusal="its feed-forward uses gelu"),
    Case("mistral", {"sliding_window": None}),
    Case("mistral", {"sliding_window": 7}, "model.attention.window=7"),
    Case("mistral", {"sliding_window": None, "rope_parameters": YARN}, SCALED["yarn"]),
    Case("qwen2", {}, "model.attention.bias=qkv"),
    Case("qwen2", {"rope_parameters": YARN}, f"model.attention.bias=qkv {SCALED['yarn']}"),
    Case("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
         "model.attention.bias=qkv model.attention.window=7"),
    Case("qwen3", {}, QK_NORM),
    Case("qwen3", {"attention_bias": True}, f"{QK_NORM} model.attention.bias=all"),
    Case("qwen3", {"rope_parameters": LINEAR}, f"{QK_NORM} {SCALED['linear']}"),
    Case("mixtral", {"num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **EXPERTS},
         f"{SOFTMAX} model.ffn.router.normalize=true model.norm.eps=1e-5 model.position.base=1e6"),
    Case("mixtral", {"num_local_experts": 4, "sliding_window": 7, **EXPERTS}, refusal="model.attention.window is None"),
    Case("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": False, **EXPERTS},
         f"{SOFTMAX} {QK_NORM} model.ffn.router.normalize=false"),
    Case("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True, "attention_bias": True,
                       **EXPERTS},
         f"{SOFTMAX} {QK_NORM} model.ffn.router.normalize=true model.attention.bias=all"),
    Case("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 48, "mlp_only_layers": [0], "norm_topk_prob": True,
                       **EXPERTS},
         f"{SOFTMAX} {QK_NORM} model.ffn.router.normalize=true model.first_ffn_layers=1"),
    Case("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 48, "mlp_only_layers": [1], **EXPERTS},
         refusal=r"model.first_ffn_layers is 0, there it is \[1\]"),
    Case("glm4_moe", {"n_routed_experts": 4, "moe_intermediate_size": 48, "n_shared_experts": 1,
                      "first_k_dense_replace": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                                      "partial_rotary_factor": 1.0}, **EXPERTS},
         f"{MOE} model.ffn.num_shared_experts=1 model.first_ffn_layers=1 model.norm.eps=1e-5 "
         "model.ffn.router.normalize=true model.ffn.router.routed_scale=1.0"),
    Case("glm4_moe", {"n_routed_experts": 4, "moe_intermediate_size": 48, "n_shared_experts": 1, "attention_bias": True,
                      "first_k_dense_replace": 0, "use_qk_norm": True, **EXPERTS},
         f"{MOE} {QK_NORM} model.attention.qk_norm_eps=1e-5 model.ffn.num_shared_experts=1 model.norm.eps=1e-5 "
         "model.attention.bias=qkv model.position.rotary_share=0.5 model.ffn.router.normalize=true "
         "model.ffn.router.routed_scale=1.0"),
    Case("glm4_moe", {"n_routed_experts": 4, "moe_intermediate_size": 48, "n_group": 2, "topk_group": 1, **EXPERTS},
         refusal="n_group and topk_group: its router chooses among 1 of 2 groups"),
]  # fmt: skip


def row(case: Case) -> str:
    """Return one line of the table."""
    config = ", ".join(f"{key}={_short(value)}" for key, value in case.config.items()) or "as its class has them"
    answer = f"refused: {case.refusal}".replace("\\", "") if case.refusal else f"`{case.overrides or 'no setting'}`"
    return f"| {case.model_type} | {config} | {answer} |"


def _short(value: object) -> str:
    return str(value["rope_type"]) + " …" if isinstance(value, dict) else str(value)


def table() -> str:
    """Return the table of docs/adaptation.md."""
    return "\n".join(["| `model_type` | settings of config.json | read with |", "|---|---|---|", *map(row, CASES)])
