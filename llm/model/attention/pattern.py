"""A pattern of attention kinds over the layers."""

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from llm.contracts import AttentionGeometry
from llm.errors import ConfigError, did_you_mean
from llm.model.position.base import Position


def attention_of_layer(
    *,
    pattern: Sequence[str],
    kinds: Mapping[str, Callable[..., nn.Module]],
    geometry: AttentionGeometry,
    position: Position,
    layer_index: int,
) -> nn.Module:
    """Build the attention of one layer of a hybrid: layer i gets kind pattern[i mod len(pattern)].

    Args:
        pattern: names of kinds, repeated over the layers.
        kinds: factories by name, each called as attentions are.
        geometry: dimensions of the layer.
        position: module shared by all layers.
        layer_index: index of the layer, from 0.

    Raises:
        ConfigError: an empty pattern, or a name that is no kind.
    """
    if not pattern:
        raise ConfigError(f"model.attention.pattern=[]: names no kind; choose from {', '.join(kinds)}")
    for name in pattern:
        if name not in kinds:
            raise ConfigError(
                f"model.attention.pattern={list(pattern)}: {name} is no kind of model.attention.kinds"
                f"{did_you_mean(name, kinds)}; choose from {', '.join(kinds)}"
            )
    return kinds[pattern[layer_index % len(pattern)]](geometry=geometry, position=position, layer_index=layer_index)
