"""Composes the configuration of a run from overrides, as the command line does."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from llm.commands.in_process import ComposedRun, composed_run
from llm.training.plan import describe_plan


class Configuration(Mapping[str, Any]):
    """A composed and checked configuration, which `llm.train` takes. It reads like the nested mapping of config.yaml.

    Args:
        composed: the run that was composed.
    """

    def __init__(self, composed: ComposedRun) -> None:
        self.composed = composed

    def __getitem__(self, key: str) -> Any:
        return self.composed.checked.tree[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.composed.checked.tree)

    def __len__(self) -> int:
        return len(self.composed.checked.tree)

    def __str__(self) -> str:
        return yaml.safe_dump(dict(self), sort_keys=False, allow_unicode=True)

    def __repr__(self) -> str:
        return f"llm.compose({', '.join(map(repr, self.composed.line.overrides))})"

    def plan(self) -> str:
        """Return parameters, memory, FLOPs and learning rates of the run as text, without training."""
        return describe_plan(self.composed.checked)


def compose(*overrides: str) -> Configuration:
    """Return the configuration that overrides of `conf/train.yaml` describe: `llm.compose("optimizer=muon")`.

    Args:
        overrides: arguments of `python train.py`, such as "model=moe", "max_steps=200" or "resume=runs/<folder>".

    Raises:
        ConfigError: every mistake that the command line would report, one line each.
    """
    return Configuration(composed_run(overrides))
