"""Finds the Hugging Face class that computes exactly what a decoder computes, or the reasons why none does."""

from typing import Any, NamedTuple

from llm.adapt.ladder import LadderTransformer
from llm.errors import ConfigError
from llm.huggingface.bias_rules import attention_bias, bias_reasons, has_ffn_bias
from llm.huggingface.rotary_settings import EXPORTED, rope_parameters, rotary_share
from llm.model.attention.softmax import SoftmaxAttention
from llm.model.factored import FactoredLinear
from llm.model.ffn.moe import MoE
from llm.model.ffn.router import TopKRouter
from llm.model.ffn.swiglu import SwiGLU
from llm.model.norm import RMSNorm
from llm.model.transformer import Transformer


class NoFamilyError(ConfigError):
    """No Hugging Face class computes a decoder, for the given reasons."""

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = "; ".join(dict.fromkeys(reasons))
        super().__init__(
            f"format=hf: no Hugging Face class computes this decoder ({self.reasons}); change model.* and train again"
        )


class Family(NamedTuple):
    """A Hugging Face class, and the configuration under which it computes a given decoder."""

    architecture: str
    model_type: str
    config: dict[str, Any]


def find_family(model: Transformer, *, context_length: int, bos_id: int) -> Family:
    """Return the class that computes what `model` computes.

    A dense decoder becomes Qwen3 with QK-norm, Mistral with a window in every layer, and Llama otherwise. Experts with
    softmax scores become Mixtral or Qwen3-MoE. Experts with sigmoid scores become GLM-4-MoE, which has DeepSeek-V3's
    router and plain grouped-query attention.

    Args:
        model: the decoder.
        context_length: tokens per window in training.
        bos_id: the token that begins a document and thereby ends the one before it.

    Raises:
        NoFamilyError: no class computes it; the message lists the reasons.
    """
    reasons = [*_factor_reasons(model), *_attention_reasons(model), *_norm_reasons(model), *_ffn_reasons(model)]
    reasons = reasons or bias_reasons(model, is_glm=_is_glm(model))
    if reasons:
        raise NoFamilyError(reasons)
    config = _geometry(model, context_length=context_length, bos_id=bos_id)
    experts = [block.ffn for block in model.blocks() if isinstance(block.ffn, MoE)]
    family = _expert_family(model, experts[0], config) if experts else _dense_family(model, config)
    config = {"architectures": [family.architecture], "model_type": family.model_type} | family.config
    return family._replace(config=config)


def _factor_reasons(model: Transformer) -> list[str]:
    if isinstance(model, LadderTransformer):
        return ["adapt=ladder: no class has a side network"]
    is_factored = any(isinstance(module, FactoredLinear) for module in model.modules())
    return ["model.low_rank factors projections"] if is_factored else []


def _attention_reasons(model: Transformer) -> list[str]:
    reasons = [] if model.final_query is None else ["model.residual=attention"]
    for block in model.blocks():
        attention = block.attention
        if type(attention) is not SoftmaxAttention:
            reasons.append(f"model/attention is {type(attention).__name__}")
        elif attention.key_norm:
            reasons.append("model.attention.key_norm=true")
        elif attention.shared_kv:
            reasons.append("model.attention.shared_kv=true")
    position = model.position
    if type(position) not in EXPORTED:
        reasons.append(f"model/position is {type(position).__name__}")
    elif position.scales_queries:
        reasons.append("model.position.log_n scales queries")
    elif position.turns_values:
        reasons.append("model.position.turn_values=true")
    elif _turning_share(model) < 1 and not _is_glm(model):
        reasons.append("model.position.rotary_share below 1 without experts of sigmoid scores, which GLM-4-MoE has")
    return reasons


def _is_glm(model: Transformer) -> bool:
    """Return whether the experts are those of GLM-4-MoE, the one class here that turns a part of each head."""
    routers = [block.ffn.router for block in model.blocks() if isinstance(block.ffn, MoE)]
    return bool(routers) and isinstance(routers[0], TopKRouter) and routers[0].scores == "sigmoid"


def _turning_share(model: Transformer) -> float:
    """Return the share of each head that turns."""
    return min((rotary_share(a.position, a.head_dim) for a in _attentions(model)), default=1.0)


def _norm_reasons(model: Transformer) -> list[str]:
    norms = [norm for block in model.blocks() for norm in (block.attention_norm, block.ffn_norm)] + [model.final_norm]
    if other := {type(norm).__name__ for norm in norms if type(norm) is not RMSNorm}:
        return [f"model/norm is {', '.join(other)}"]
    norms += [attention.q_norm for attention in _attentions(model) if attention.q_norm is not None]
    eps = sorted({float(norm.eps) for norm in norms})  # pyright: ignore[reportArgumentType]
    if len(eps) == 1:
        return []
    return [f"norms of queries and of layers differ in eps: {eps}; set model.attention.qk_norm_eps to model.norm.eps"]


def _attentions(model: Transformer) -> list[SoftmaxAttention]:
    return [block.attention for block in model.blocks() if isinstance(block.attention, SoftmaxAttention)]


def _ffn_reasons(model: Transformer) -> list[str]:
    reasons = []
    for block in model.blocks():
        ffn = block.ffn
        if isinstance(ffn, MoE):
            if ffn.experts.normalize_outputs:
                reasons.append("model.ffn.normalize_outputs=true")
            if ffn.latent_in_proj is not None:
                reasons.append("model.ffn.latent")
            if not isinstance(ffn.router, TopKRouter):
                reasons.append(f"model/ffn/router is {type(ffn.router).__name__}")
        elif not isinstance(ffn, SwiGLU):
            reasons.append(f"model/ffn is {type(ffn).__name__}")
        if (ffn.experts if isinstance(ffn, MoE) else ffn).caps is not None:
            reasons.append("model.ffn.activation=situ")
    return reasons


def _geometry(model: Transformer, *, context_length: int, bos_id: int) -> dict[str, Any]:
    attention = _attentions(model)[0]
    rope = rope_parameters(attention.position)
    scaled = {} if rope["rope_type"] == "default" else {"rope_scaling": rope}  # read by transformers 4
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.final_norm.eps,
        "attention_bias": attention_bias(model) != "none",
        "attention_dropout": 0.0,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": model.lm_head.weight is model.token_embedding.weight,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": bos_id,
        "pad_token_id": bos_id,
    } | scaled


def _has_qk_norm(model: Transformer) -> bool:
    return any(attention.q_norm is not None for attention in _attentions(model))


def _windows(model: Transformer) -> list[int | None]:
    return [attention.window for attention in _attentions(model)]


def _dense_family(model: Transformer, config: dict[str, Any]) -> Family:
    windows = _windows(model)
    config = config | {"intermediate_size": model.blocks()[0].ffn.gate_proj.weight.shape[0]}
    if _has_qk_norm(model):
        return Family("Qwen3ForCausalLM", "qwen3", config | _layer_windows(windows))
    if attention_bias(model) == "qkv":
        del config["attention_bias"]  # a Qwen2 always has these three
        return Family("Qwen2ForCausalLM", "qwen2", config | _layer_windows(windows))
    if len(set(windows)) > 1:
        raise NoFamilyError(["layers with and without a window, and no model.attention.qk_norm"])
    if windows[0] is not None:
        return Family("MistralForCausalLM", "mistral", config | {"sliding_window": windows[0]})
    if model.d_model % config["num_attention_heads"]:
        raise NoFamilyError(["a Llama's model.d_model must be a multiple of model.num_heads"])
    return Family("LlamaForCausalLM", "llama", config | {"mlp_bias": has_ffn_bias(model)})


def _layer_windows(windows: list[int | None]) -> dict[str, Any]:
    sizes = {window for window in windows if window is not None}
    if len(sizes) > 1:
        raise NoFamilyError([f"windows of {len(sizes)} lengths"])
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
        raise NoFamilyError(["experts and model.attention.window together"])
    if router.scores == "sigmoid":
        if moe.num_experts < 2:
            raise NoFamilyError(["model.ffn.num_experts=1: DeepSeek-V3's router needs at least two"])
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
            "partial_rotary_factor": _turning_share(model),
        }
        rope = config["rope_parameters"] | {"partial_rotary_factor": _turning_share(model)}
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
        raise NoFamilyError(reasons)
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
