"""A pattern of attention kinds over the layers."""

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from llm.contracts import AttentionGeometry
from llm.errors import ConfigError, did_you_mean
from llm.model.position.position_module import Position


def attention_of_layer(
    *,
    pattern: Sequence[str],
    kinds: Mapping[str, Callable[..., nn.Module]],
    geometry: AttentionGeometry,
    position: Position,
    layer_index: int,
    positions: Mapping[str, Callable[..., Position] | None] | None = None,
) -> nn.Module:
    """Build the attention of one layer of a hybrid: layer i gets kind pattern[i mod len(pattern)].

    Args:
        pattern: names of kinds, repeated over the layers.
        kinds: factories by name, each called as attentions are.
        geometry: dimensions of the layer.
        position: position of the kinds that have none of their own, shared by all layers.
        layer_index: index of the layer, from 0.
        positions: factories of the kinds' own positions by name, called with head_dim; null or absent for `position`.

    Raises:
        ConfigError: the pattern is empty, or names a kind that does not exist.

    Source: RoPE in local layers with no position in global ones, Yang et al., "RoPE to NoPE and Back Again",
    arXiv:2501.18795; a base per kind as in Gemma 3, arXiv:2503.19786.
    """
    if not pattern:
        raise ConfigError(f"model.attention.pattern=[]: names no kind; choose from {', '.join(kinds)}")
    check_kinds(f"model.attention.pattern={list(pattern)}", pattern, kinds)
    own = positions or {}
    check_kinds(f"model.attention.positions={sorted(own)}", own, kinds)
    kind = pattern[layer_index % len(pattern)]
    build_position = own.get(kind)
    if build_position is not None:
        position = build_position(head_dim=geometry.head_dim)
    return kinds[kind](geometry=geometry, position=position, layer_index=layer_index)


def check_kinds(setting: str, names: Sequence[str] | Mapping[str, object], kinds: Mapping[str, object]) -> None:
    """Raise ConfigError for a name that is not a kind of attention."""
    for name in names:
        if name not in kinds:
            raise ConfigError(
                f"{setting}: {name} is not in model.attention.kinds{did_you_mean(name, kinds)}; choose from "
                f"{', '.join(kinds)}"
            )
