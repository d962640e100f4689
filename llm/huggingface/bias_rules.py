"""Which projections of a decoder have biases, and which Hugging Face class has the same."""

from llm.model.attention.softmax import SoftmaxAttention
from llm.model.ffn.moe import MoE
from llm.model.ffn.swiglu import SwiGLU
from llm.model.transformer import Transformer


def attention_bias(model: Transformer) -> str:
    """Return `model.attention.bias` of the first layer with softmax attention."""
    return next((b.attention.bias for b in model.blocks() if isinstance(b.attention, SoftmaxAttention)), "none")


def has_ffn_bias(model: Transformer) -> bool:
    """Return whether a dense feed-forward has biases."""
    return any(isinstance(block.ffn, SwiGLU) and block.ffn.has_bias for block in model.blocks())


def bias_reasons(model: Transformer, *, is_glm: bool) -> list[str]:
    """Return why no class has the biases of a decoder.

    Biases of queries, keys and values alone belong to Qwen2 and GLM-4-MoE; those of all four projections to Llama,
    Qwen3 and Qwen3-MoE; those of feed-forwards to Llama.

    Args:
        model: the decoder, whose attentions are softmax.
        is_glm: whether its experts are those of GLM-4-MoE.
    """
    blocks = model.blocks()
    bias = attention_bias(model)
    if any(block.attention.bias != bias for block in blocks):
        return ["layers differ in model.attention.bias"]
    has_experts = any(isinstance(block.ffn, MoE) for block in blocks)
    has_norm = any(block.attention.q_norm is not None for block in blocks)
    has_window = any(block.attention.window is not None for block in blocks)
    is_llama = not (has_norm or has_experts or has_window)
    with_all = is_llama or (has_norm and not is_glm)
    with_three = is_glm or not (has_norm or has_experts)
    reasons = []
    if (bias == "all" and not with_all) or (bias == "qkv" and not with_three):
        reasons.append(f"model.attention.bias={bias} beside this norm, window or experts")
    if has_ffn_bias(model) and not (is_llama and bias != "qkv"):
        reasons.append("model.ffn.bias=true, which a Llama alone has")
    return reasons
