"""Defines a configuration that passed every check, with the sizes that follow from it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llm.config.run import RunConfig
from llm.config.sizes import Sizes


@dataclass(frozen=True, kw_only=True)
class CheckedConfig:
    """A valid configuration, the one argument of training; `check` returns it.

    Args:
        tree: the plain configuration, by group; builders in `llm.config.build` read its nodes. It is never changed.
        run: the run-level keys.
        sizes: the values that follow from the configuration by arithmetic.
    """

    tree: Mapping[str, Any]
    run: RunConfig
    sizes: Sizes

    def with_micro_batch_size(self, micro_batch_size: int) -> "CheckedConfig":
        """Return this configuration with the micro-batch size that was found for it."""
        return replace(
            self,
            tree={**self.tree, "micro_batch_size": micro_batch_size},
            run=replace(self.run, micro_batch_size=micro_batch_size),
            sizes=self.sizes.with_micro_batch_size(micro_batch_size),
        )

    def with_scaling(self, node: Mapping[str, Any]) -> "CheckedConfig":
        """Return this configuration with another node of the scaling rule, whose noise scale is known."""
        return replace(self, tree={**self.tree, "scaling": dict(node)}, sizes=replace(self.sizes, needs_probe=False))
