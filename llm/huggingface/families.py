"""Which Hugging Face class computes exactly what a decoder computes, and why none does where none does."""

from typing import Any, NamedTuple

from llm.errors import ConfigError
from llm.model.attention.softmax import SoftmaxAttention
from llm.model.ffn.moe import MoE
from llm.model.ffn.router import TopKRouter
from llm.model.ffn.swiglu import SwiGLU
from llm.model.norm import RMSNorm
from llm.model.position.ntk import NTKRoPE
from llm.model.position.rope import RoPE
from llm.model.transformer import Transformer


class Family(NamedTuple):
    """A Hugging Face class and the configuration under which it is a given decoder."""

    architecture: str
    model_type: str
    config: dict[str, Any]


def find_family(model: Transformer, *, context_length: int, bos_id: int) -> Family:
    """Return the class that computes what `model` computes.

    Dense decoders become Llama, Mistral where all layers have a window, or Qwen3 under QK-norm; experts become Mixtral
    or Qwen3-MoE where a softmax over all experts weighs them, and GLM-4-MoE, which has DeepSeek-V3's router over plain
    grouped-query attention, where sigmoid scores and a selection bias do.

    Args:
        model: the decoder.
        context_length: tokens a window in training.
        bos_id: the token that begins a document and tells that the one before has ended.

    Raises:
        ConfigError: no class computes it; the message lists what stands in the way.
    """
    reasons = [*_attention_reasons(model), *_norm_reasons(model), *_ffn_reasons(model)]
    if reasons:
        raise ConfigError(_refusal(reasons))
    config = _geometry(model, context_length=context_length, bos_id=bos_id)
    experts = [block.ffn for block in model.blocks() if isinstance(block.ffn, MoE)]
    family = _expert_family(model, experts[0], config) if experts else _dense_family(model, config)
    config = {"architectures": [family.architecture], "model_type": family.model_type} | family.config
    return family._replace(config=config)


def _refusal(reasons: list[str]) -> str:
    listed = "; ".join(dict.fromkeys(reasons))
    return f"format=hf: no Hugging Face class computes this decoder ({listed}); change model.* and train again"


def _attention_reasons(model: Transformer) -> list[str]:
    reasons = []
    for block in model.blocks():
        attention = block.attention
        if type(attention) is not SoftmaxAttention:
            reasons.append(f"model/attention is {type(attention).__name__}")
        elif attention.key_norm:
            reasons.append("model.attention.key_norm=true")
    position = model.position
    if type(position) not in (RoPE, NTKRoPE):
        reasons.append(f"model/position is {type(position).__name__}")
    elif position.scales_queries:  # type: ignore[operator]
        reasons.append("model.position.log_n scales queries")
    return reasons


def _norm_reasons(model: Transformer) -> list[str]:
    norms = [norm for block in model.blocks() for norm in (block.attention_norm, block.ffn_norm)] + [model.final_norm]
    if other := {type(norm).__name__ for norm in norms if type(norm) is not RMSNorm}:
        return [f"model/norm is {', '.join(other)}"]
    eps = {norm.eps for norm in norms}  # type: ignore[union-attr]
    for block in model.blocks():
        eps |= {norm.eps for norm in (getattr(block.attention, "q_norm", None),) if norm is not None}
    return [] if len(eps) == 1 else [f"norms of queries and of layers differ in eps: {sorted(eps)}"]  # type: ignore[type-var]


def _ffn_reasons(model: Transformer) -> list[str]:
    reasons = []
    for block in model.blocks():
        ffn = block.ffn
        if isinstance(ffn, MoE):
            if ffn.experts.normalize_outputs:
                reasons.append("model.ffn.normalize_outputs=true")
            if not isinstance(ffn.router, TopKRouter):
                reasons.append(f"model/ffn/router is {type(ffn.router).__name__}")
        elif not isinstance(ffn, SwiGLU):
            reasons.append(f"model/ffn is {type(ffn).__name__}")
    return reasons


def _geometry(model: Transformer, *, context_length: int, bos_id: int) -> dict[str, Any]:
    attention = model.blocks()[0].attention
    theta = rope_theta(model)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.final_norm.eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "max_position_embeddings": context_length,
        "tie_word_embeddings": model.lm_head.weight is model.token_embedding.weight,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": bos_id,
        "pad_token_id": bos_id,
    }


def rope_theta(model: Transformer) -> float:
    """Return the base under which plain RoPE turns as the decoder's position does."""
    position = model.position
    assert isinstance(position, RoPE)
    if not isinstance(position, NTKRoPE):
        return position.base
    head_dim = model.blocks()[0].attention.head_dim
    return position.base * position.factor ** (head_dim / (head_dim - 2))


def _has_qk_norm(model: Transformer) -> bool:
    return any(block.attention.q_norm is not None for block in model.blocks())


def _windows(model: Transformer) -> list[int | None]:
    return [block.attention.window for block in model.blocks()]


def _dense_family(model: Transformer, config: dict[str, Any]) -> Family:
    windows = _windows(model)
    config = config | {"intermediate_size": model.blocks()[0].ffn.gate_proj.weight.shape[0]}
    if _has_qk_norm(model):
        return Family("Qwen3ForCausalLM", "qwen3", config | _layer_windows(windows))
    if len(set(windows)) > 1:
        raise ConfigError(_refusal(["layers with and without a window, and no model.attention.qk_norm"]))
    if windows[0] is not None:
        return Family("MistralForCausalLM", "mistral", config | {"sliding_window": windows[0]})
    if model.d_model % config["num_attention_heads"]:
        raise ConfigError(_refusal(["Llama wants model.num_heads to divide model.d_model"]))
    return Family("LlamaForCausalLM", "llama", config | {"mlp_bias": False})


def _layer_windows(windows: list[int | None]) -> dict[str, Any]:
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1:
        raise ConfigError(_refusal([f"windows of {len(sizes)} lengths"]))
    if not sizes:
        return {"use_sliding_window": False, "sliding_window": None}
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {"use_sliding_window": True, "sliding_window": sizes.pop(), "max_window_layers": 0, "layer_types": kinds}


def _expert_family(model: Transformer, moe: MoE, config: dict[str, Any]) -> Family:
    router = moe.router
    assert isinstance(router, TopKRouter)
    dense = [isinstance(block.ffn, SwiGLU) for block in model.blocks()]
    dense_width = next((b.ffn.gate_proj.weight.shape[0] for b in model.blocks() if isinstance(b.ffn, SwiGLU)), None)
    shared = 0 if moe.shared is None else moe.shared.gate_proj.weight.shape[0] // moe.d_expert
    config = config | {"num_experts_per_tok": router.top_k, "output_router_logits": False}
    if any(window is not None for window in _windows(model)):
        raise ConfigError(_refusal(["experts and model.attention.window together"]))
    if router.scores == "sigmoid":
        if moe.num_experts < 2:
            raise ConfigError(_refusal(["model.ffn.num_experts=1: DeepSeek-V3's router ranks two or more"]))
        own = {
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": shared,
            "moe_intermediate_size": moe.d_expert,
            "intermediate_size": dense_width or moe.d_expert,
            "first_k_dense_replace": sum(dense),
            "routed_scaling_factor": router.routed_scale,
            "norm_topk_prob": router.normalize,
            "n_group": 1,
            "topk_group": 1,
            "use_qk_norm": _has_qk_norm(model),
            "partial_rotary_factor": 1.0,
        }
        rope = config["rope_parameters"] | {"partial_rotary_factor": 1.0}
        return Family("Glm4MoeForCausalLM", "glm4_moe", config | own | {"rope_parameters": rope})
    return _softmax_experts(model, moe, router, config, dense=dense, dense_width=dense_width)


def _softmax_experts(
    model: Transformer,
    moe: MoE,
    router: TopKRouter,
    config: dict[str, Any],
    *,
    dense: list[bool],
    dense_width: int | None,
) -> Family:
    reasons = []
    if router.scores != "softmax":
        reasons.append(f"model.ffn.router.scores={router.scores}")
    if moe.shared is not None:
        reasons.append("softmax scores with model.ffn.num_shared_experts")
    if moe.balance.selection_bias() is not None:
        reasons.append("softmax scores with a balance that biases the choice")
    if router.routed_scale != 1.0:
        reasons.append(f"softmax scores with model.ffn.router.routed_scale={router.routed_scale:.4g}")
    if not _has_qk_norm(model) and not router.normalize:
        reasons.append("softmax scores that are not normalised, without model.attention.qk_norm")
    if not _has_qk_norm(model) and any(dense):
        reasons.append("softmax scores and dense first layers, without model.attention.qk_norm")
    if reasons:
        raise ConfigError(_refusal(reasons))
    if not _has_qk_norm(model):
        own = {"num_local_experts": moe.num_experts, "intermediate_size": moe.d_expert, "sliding_window": None}
        return Family("MixtralForCausalLM", "mixtral", config | own)
    own = {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.d_expert,
        "intermediate_size": dense_width or moe.d_expert,
        "mlp_only_layers": [index for index, is_dense in enumerate(dense) if is_dense],
        "decoder_sparse_step": 1,
        "norm_topk_prob": router.normalize,
        "use_sliding_window": False,
    }
    return Family("Qwen3MoeForCausalLM", "qwen3_moe", config | own)
