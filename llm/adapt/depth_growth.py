"""Continues a trained decoder with more layers."""

from typing import Literal

import torch
from torch import Tensor

from llm.adapt.growth_rule import copied
from llm.errors import ConfigError
from llm.model.init import RESIDUAL_OUTPUTS
from llm.model.transformer import Transformer


class DepthGrowth:
    """Growth in depth from L to L' layers.

    `identity` follows each layer i // (L'/L) by copies whose projections into the residual stream are zero. A copy adds
    nothing at first, so that the function is unchanged, and its projections receive gradients from the first update.
    `copy` stacks the whole decoder again: layer i has the weights of layer i mod L. The function changes.

    Args:
        new_layers: identity or copy.

    Source: identity: Wu et al., "LLaMA Pro", arXiv:2401.02415, section 3.2; copy: Gong et al., "Efficient Training of
    BERT by Progressively Stacking", ICML 2019, and Du et al., arXiv:2405.15319 (G_stack).
    """

    def __init__(self, *, new_layers: Literal["identity", "copy"]) -> None:
        self.new_layers = new_layers

    @property
    def keeps_function(self) -> bool:
        """Whether the larger decoder computes the same at the start."""
        return self.new_layers == "identity"

    def __call__(self, source: Transformer, target: Transformer) -> dict[str, Tensor]:
        """Return the weights of the deeper decoder.

        Raises:
            ConfigError: the decoder is not deeper, another size differs, or a layer is of another kind.
        """
        before, after = len(source.layers), len(target.layers)
        if after <= before:
            raise ConfigError(
                f"grow=depth: model.num_layers={after} must be above the run's {before}; try {2 * before}"
            )
        if target.final_query is not None:
            raise ConfigError(
                "grow=depth: model.residual=attention weighs the sublayers that exist, so that more of them change "
                "every weight; set model.residual=sum"
            )
        given, state = source.state_dict(), {}
        for name, expected in target.state_dict().items():
            index = int(name.split(".")[1]) if name.startswith("layers.") else None
            origin = None if index is None else self._origin(index, before, after)
            former = name if origin is None else name.replace(f"layers.{index}.", f"layers.{origin}.", 1)
            if former not in given:
                raise ConfigError(f"grow=depth: the run has no {former} to make {name} of; keep model.* as in the run")
            tensor = copied(name, given[former], expected, grow="depth")
            is_new = index is not None and self._is_new(index, before, after)
            is_output = any(part in RESIDUAL_OUTPUTS for part in name.split("."))
            is_output = is_output and ".first." not in name  # of two factors that are both zero, neither would learn
            is_zero = self.keeps_function and is_new and is_output
            state[name] = torch.zeros_like(tensor) if is_zero else tensor.clone()
        return state

    def _origin(self, index: int, before: int, after: int) -> int:
        return index * before // after if self.keeps_function else index % before

    def _is_new(self, index: int, before: int, after: int) -> bool:
        """Return whether a layer repeats the one below it, for layers that are inserted."""
        return index > 0 and self._origin(index, before, after) == self._origin(index - 1, before, after)
