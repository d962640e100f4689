"""Compresses the weights of a decoder, and the settings of its model to match."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llm.adapt.low_rank import column_row_units, interpolative_units, svd_factors
from llm.errors import ConfigError
from llm.model.factored import FactoredLinear
from llm.model.ffn.swiglu import SwiGLU
from llm.model.transformer import Transformer
from llm.ops.linear_layer import Linear

Method = Literal["svd", "interpolative", "column_row"]


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A decoder's weights after compression, with the settings of its model.

    Args:
        model: the node of the model that has these weights.
        state: the weights by name.
        kept: weights in the compressed matrices, divided by those before.
        settings: what was decided, as overrides of a command line.
    """

    model: dict[str, Any]
    state: dict[str, Tensor]
    kept: float
    settings: str


def factor(model: Transformer, node: Mapping[str, Any], *, rank: int | None, share: float | None) -> Compressed:
    """Return a decoder in which every projection is the product of two factors, by singular values.

    Args:
        model: the decoder, whose projections have full rank.
        node: the node of its model.
        rank: rank of every projection; a projection with a smaller side keeps its own matrix.
        share: share of each projection's weights to keep, in place of rank.

    Raises:
        ConfigError: the projections are already factored.
    """
    if any(isinstance(module, FactoredLinear) for module in model.modules()):
        raise ConfigError("method=svd: the projections of this run are already factored; compress the original run")
    matrices = projections(model)
    ranks: dict[str, int] = {}
    for name, module in matrices.items():
        leaf, wanted = name.rpartition(".")[2], rank or _rank_of_share(module, share or 1.0)
        ranks[leaf] = min(wanted, ranks.get(leaf, wanted), module.in_features, module.out_features)
    state, before, after = model.state_dict(), 0, 0
    for name, module in matrices.items():
        second, first = svd_factors(state.pop(f"{name}.weight"), ranks[name.rpartition(".")[2]])
        if module.bias is not None:
            state[f"{name}.second.bias"] = state.pop(f"{name}.bias")
        state |= {f"{name}.second.weight": second.float(), f"{name}.first.weight": first.float()}
        before, after = before + module.weight.numel(), after + second.numel() + first.numel()
    text = ",".join(f"{name}:{value}" for name, value in ranks.items())
    changed = deepcopy(dict(node)) | {"low_rank": ranks}
    return Compressed(model=changed, state=state, kept=after / before, settings=f"model.low_rank={{{text}}}")


def projections(model: torch.nn.Module) -> dict[str, Linear]:
    """Return the linear projections of full rank by name."""
    named = model.named_modules()
    return {name: module for name, module in named if isinstance(module, Linear) and name.endswith("_proj")}


def _rank_of_share(module: Linear, share: float) -> int:
    """Return the largest rank at which both factors have at most this share of the matrix, at least 1."""
    return max(1, int(share * module.weight.numel() / (module.in_features + module.out_features)))


def drop_units(
    model: Transformer,
    node: Mapping[str, Any],
    *,
    method: Method,
    rank: int | None,
    share: float | None,
    activations: Mapping[int, Tensor],
) -> Compressed:
    """Return a decoder with fewer hidden units in every feed-forward layer.

    `interpolative` corrects the next matrix so that the kept units stand in for the dropped ones; `column_row` drops
    the units that contribute least.

    Args:
        model: the decoder, with dense feed-forwards.
        node: the node of its model.
        method: how the kept units are chosen.
        rank: number of kept units.
        share: share of the units to keep, in place of rank.
        activations: hidden units [tokens, d_ff] of each layer on training text.
    """
    state, width = model.state_dict(), dense_width(model)
    units = min(width, rank or max(1, round(width * (share or 1.0))))
    for index, hidden in activations.items():
        if hidden.shape[0] < width:
            raise ConfigError(
                f"tokens={hidden.shape[0]}: fewer than the {width} hidden units to choose among; set tokens={4 * width}"
            )
        prefix = f"layers.{index}.ffn"
        down = state[f"{prefix}.down_proj.weight"]
        block_has_bias = f"{prefix}.up_proj.bias" in state
        if method == "interpolative" and units < width:
            kept, mixing = interpolative_units(hidden, units)
            state[f"{prefix}.down_proj.weight"] = (down.double() @ mixing.T.to(down.device)).float()
        else:
            kept = column_row_units(hidden, down, units)
            state[f"{prefix}.down_proj.weight"] = down[:, kept]
        for part in ("gate_proj", "up_proj"):
            for leaf in ("weight", "bias") if block_has_bias else ("weight",):
                state[f"{prefix}.{part}.{leaf}"] = state[f"{prefix}.{part}.{leaf}"][kept]
    changed = deepcopy(dict(node))
    changed["ffn"]["d_ff"] = units
    return Compressed(model=changed, state=state, kept=units / width, settings=f"model.ffn.d_ff={units}")


def dense_width(model: Transformer) -> int:
    """Return d_ff of a decoder whose feed-forwards are all dense.

    Raises:
        ConfigError: a feed-forward has experts or factored projections.
    """
    for index, block in enumerate(model.blocks()):
        if not isinstance(block.ffn, SwiGLU) or isinstance(block.ffn.down_proj, FactoredLinear):
            raise ConfigError(
                f"method=interpolative or column_row: drops hidden units of dense feed-forwards, and layer {index} has "
                f"{type(block.ffn).__name__} or factors; use method=svd on a run of model=dense"
            )
    return model.blocks()[0].ffn.down_proj.in_features


@torch.no_grad()
def hidden_units(
    model: Transformer, batches: Iterator[Mapping[str, Any]], run: Callable[..., Any]
) -> dict[int, Tensor]:
    """Return the hidden units [tokens, d_ff] of every dense feed-forward layer.

    Args:
        model: the decoder.
        batches: keyword arguments of its forward.
        run: its forward.
    """
    found: dict[int, list[Tensor]] = {index: [] for index in range(len(model.layers))}
    hooks = [
        block.ffn.down_proj.register_forward_pre_hook(
            lambda _m, inputs, index=index: found[index].append(inputs[0].flatten(0, -2).cpu())
        )
        for index, block in enumerate(model.blocks())
    ]
    try:
        for inputs in batches:
            run(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {index: torch.cat(parts) for index, parts in found.items()}
