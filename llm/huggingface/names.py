"""Names that Hugging Face gives to the weights of a decoder: one table for both directions."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llm.errors import ConfigError
from llm.model.ffn.balance.balance_rule import without_statistics

WHOLE = {
    "token_embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
NORMS = {"attention_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight"}


class Pair(NamedTuple):
    """One weight of a decoder and its Hugging Face names, which are several for a stack of experts."""

    ours: str
    theirs: list[str]
    is_stack: bool = False


def weight_pairs(names: Mapping[str, Tensor], model_type: str) -> Iterator[Pair]:
    """Yield every weight of a decoder with its Hugging Face names; statistics of training are excluded.

    Args:
        names: the decoder's state by name; the shape of a stack gives the number of experts.
        model_type: of the Hugging Face class.

    Raises:
        ConfigError: a weight has no name in Hugging Face's classes.
    """
    for name, tensor in without_statistics(names).items():
        if name == "lm_head.weight" and is_tied(names):
            continue
        if name in WHOLE:
            yield Pair(name, [WHOLE[name]])
            continue
        table = layer_names(name.split(".")[1], model_type, count=tensor.shape[0]) if name.startswith("layers.") else {}
        part = name.split(".", 2)[-1]
        if part not in table:
            raise ConfigError(f"format=hf: the weight {name} has no name in a {model_type}; change model.*")
        theirs = table[part]
        yield Pair(name, theirs if isinstance(theirs, list) else [theirs], isinstance(theirs, list))


def layer_names(layer: str, model_type: str, *, count: int) -> dict[str, str | list[str]]:
    """Return the Hugging Face names of a layer's weights by the decoder's; a list for stacks of `count` experts."""
    prefix = f"model.layers.{layer}"
    sparse, projections = f"{prefix}.mlp", {name: name for name in PROJECTIONS}
    if model_type == "mixtral":
        sparse, projections = f"{prefix}.block_sparse_moe", MIXTRAL
    names: dict[str, str | list[str]] = {ours: f"{prefix}.{theirs}" for ours, theirs in NORMS.items()}
    names |= {f"attention.{part}.weight": f"{prefix}.self_attn.{part}.weight" for part in ATTENTION}
    names |= {f"attention.{part}.bias": f"{prefix}.self_attn.{part}.bias" for part in ATTENTION[:4]}
    names["ffn.router.proj.weight"] = f"{sparse}.gate.weight"
    names["ffn.balance.bias"] = f"{sparse}.gate.e_score_correction_bias"
    for ours, theirs in projections.items():
        names |= {f"ffn.{ours}.{leaf}": f"{prefix}.mlp.{ours}.{leaf}" for leaf in ("weight", "bias")}
        names[f"ffn.shared.{ours}.weight"] = f"{sparse}.shared_experts.{ours}.weight"
        names[f"ffn.experts.{ours}.weight"] = [f"{sparse}.experts.{e}.{theirs}.weight" for e in range(count)]
    return names


def is_tied(state: Mapping[str, Tensor]) -> bool:
    """Return whether the head shares the embedding's matrix."""
    return state["lm_head.weight"].data_ptr() == state["token_embedding.weight"].data_ptr()


def to_theirs(state: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Return a decoder's weights under Hugging Face names, with stacks of experts separated."""
    renamed: dict[str, Tensor] = {}
    for pair in weight_pairs(state, model_type):
        tensor = state[pair.ours]
        parts = tensor.unbind() if pair.is_stack else [tensor]
        renamed |= {theirs: part.contiguous() for theirs, part in zip(pair.theirs, parts, strict=True)}
    return renamed | (_absent_parts(state) if model_type == "glm4_moe" else {})


def _absent_parts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a zero bias and shared experts of width 0 for expert layers without them, which GLM-4-MoE requires."""
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
    """Return the weights that a decoder expects and that are present, and the names that remain unused.

    Args:
        theirs: weights by Hugging Face name.
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
