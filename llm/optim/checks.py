"""Checks the settings of optimizers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm.errors import CheckpointError, ConfigError, did_you_mean


def in_range(key: str, value: float, low: float, high: float, *, closed: bool = False) -> float:
    """Return `value` if low <= value < high (or <= high, if closed).

    Raises:
        ConfigError: if the value is out of range or is not a number.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (low <= value < high or (closed and value == high)):
        raise ConfigError(
            f"optimizer.{key}={value}: must be a number in [{low:g}, {high:g}{']' if closed else ')'}; choose one there"
        )
    return float(value)


def check_betas(key: str, betas: Sequence[float]) -> tuple[float, float]:
    """Return two decay rates in [0, 1).

    Raises:
        ConfigError: if there are not exactly two values, or one is out of range.
    """
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ConfigError(f"optimizer.{key}={betas}: needs two numbers; write for instance [0.9, 0.95]")
    return in_range(key, betas[0], 0.0, 1.0), in_range(key, betas[1], 0.0, 1.0)


def check_names(groups: Iterable[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> list[str]:
    """Return the parameter names of a saved optimizer state, which must be those of the groups.

    Raises:
        CheckpointError: if they differ.
    """
    own = [name for group in groups for name in group["names"]]
    saved = [name for group in state_dict["param_groups"] for name in group.get("names", [])]
    if own != saved:
        raise CheckpointError(
            f"optimizer state={len(saved)} parameters: belongs to another architecture or grouping, it differs in "
            f"{sorted(set(own) ^ set(saved))[:3]}; resume with the configuration of that run"
        )
    return saved


def one_of(key: str, name: str, choices: Iterable[str]) -> str:
    """Return `name` if it is one of the choices.

    Raises:
        ConfigError: if it is not.
    """
    if name not in (names := list(choices)):
        near = did_you_mean(str(name), names)
        raise ConfigError(f"optimizer.{key}={name}: must be one of {', '.join(names)}; choose one{near}")
    return name
