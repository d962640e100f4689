"""The names that Hugging Face gives to the weights of a decoder, one table for both directions."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class Pair(NamedTuple):
    """One of our weights, and the one or (stacked experts) several weights of theirs."""

    ours: str
    theirs: list[str]
    is_stack: bool = False


def weight_pairs(names: Mapping[str, Tensor], model_type: str) -> Iterator[Pair]:
    """Yield every weight of a decoder with its names over there.

    Args:
        names: our state by name; the stacks of experts tell their number by their shape.
        model_type: of the Hugging Face class.
    """
    for name, tensor in names.items():
        if name == "lm_head.weight" and is_tied(names):
            continue
        if name in WHOLE:
            yield Pair(name, [WHOLE[name]])
            continue
        _, layer, part = name.split(".", 2)
        yield _layer_pair(name, f"model.layers.{layer}", part, model_type, count=tensor.shape[0])


WHOLE = {
    "token_embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def _layer_pair(name: str, prefix: str, part: str, model_type: str, *, count: int) -> Pair:
    experts = "block_sparse_moe" if model_type == "mixtral" else "mlp"
    words = part.split(".")
    if words[0] == "attention":
        return Pair(name, [f"{prefix}.self_attn.{'.'.join(words[1:])}"])
    if part in NORMS:
        return Pair(name, [f"{prefix}.{NORMS[part]}"])
    if part == "ffn.router.proj.weight":
        return Pair(name, [f"{prefix}.{experts}.gate.weight"])
    if part == "ffn.balance.bias":
        return Pair(name, [f"{prefix}.mlp.gate.e_score_correction_bias"])
    if words[:2] == ["ffn", "shared"]:
        return Pair(name, [f"{prefix}.mlp.shared_experts.{words[2]}.weight"])
    if words[:2] == ["ffn", "experts"]:
        theirs = MIXTRAL[words[2]] if model_type == "mixtral" else words[2]
        return Pair(name, [f"{prefix}.{experts}.experts.{e}.{theirs}.weight" for e in range(count)], is_stack=True)
    return Pair(name, [f"{prefix}.mlp.{words[1]}.weight"])


NORMS = {"attention_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight"}


def is_tied(state: Mapping[str, Tensor]) -> bool:
    """Whether the head is the embedding's own matrix."""
    return state["lm_head.weight"].data_ptr() == state["token_embedding.weight"].data_ptr()


def to_theirs(state: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Rename the weights of a decoder, and take stacks of experts apart."""
    renamed: dict[str, Tensor] = {}
    for pair in weight_pairs(state, model_type):
        tensor = state[pair.ours]
        parts = tensor.unbind() if pair.is_stack else [tensor]
        renamed |= {theirs: part.contiguous() for theirs, part in zip(pair.theirs, parts, strict=True)}
    return renamed | (_absent_parts(state) if model_type == "glm4_moe" else {})


def _absent_parts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a bias of zeros and shared experts of width 0 for the layers of experts that have none."""
    absent: dict[str, Tensor] = {}
    for name, router in state.items():
        if not name.endswith("ffn.router.proj.weight"):
            continue
        ours, theirs = name.removesuffix("router.proj.weight"), f"model.layers.{name.split('.')[1]}.mlp"
        if f"{ours}balance.bias" not in state:
            absent[f"{theirs}.gate.e_score_correction_bias"] = torch.zeros(router.shape[0])
        if f"{ours}shared.up_proj.weight" not in state:
            d_model = router.shape[1]
            for part, shape in (("gate_proj", (0, d_model)), ("up_proj", (0, d_model)), ("down_proj", (d_model, 0))):
                absent[f"{theirs}.shared_experts.{part}.weight"] = torch.zeros(shape)
    return absent


def to_ours(
    theirs: Mapping[str, Tensor], expected: Mapping[str, Tensor], model_type: str
) -> tuple[dict[str, Tensor], set[str]]:
    """Rename weights into those that a decoder expects, as far as they are there; also return the names left over.

    Args:
        theirs: their weights.
        expected: the decoder's own `state_dict()`, for its names and shapes.
        model_type: of the Hugging Face class.
    """
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    for pair in weight_pairs(expected, model_type):
        found = [theirs[name] for name in pair.theirs if name in theirs]
        if len(found) == len(pair.theirs):
            state[pair.ours] = torch.stack(found) if pair.is_stack else found[0]
            used |= set(pair.theirs)
    if is_tied(expected) and "token_embedding.weight" in state:
        state["lm_head.weight"] = state["token_embedding.weight"]
    empty = {name for name in set(theirs) - used if not theirs[name].any()}  # a bias of zeros, a width of 0
    return state, set(theirs) - used - empty
