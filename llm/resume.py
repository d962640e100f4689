"""What a resumed run may change: a saved configuration and a command line in, the configuration to run out."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from llm.errors import ConfigError

FREE_KEYS = frozenset({"resume", "max_steps", "max_tokens", "val_every", "checkpoint_every", "plan", "on_nonfinite"})
FREE_GROUPS = frozenset({"logger", "callbacks", "trainer", "hydra"})
FREE_LOADER_KEYS = frozenset({"num_workers", "cache_dir", "num_processes"})


def merge_resumed(saved: Mapping[str, Any], composed: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return the saved configuration with those overrides that do not change what was trained.

    Args:
        saved: configuration of the run folder.
        composed: what this command line composes to.
        overrides: this command line's overrides, `key=value` or `group=option`.

    Raises:
        ConfigError: overrides that contradict the saved run, all of them with both values.
    """
    merged = deepcopy(dict(saved))
    contradictions = []
    for override in overrides:
        key = override.lstrip("+~").split("=", 1)[0].split("@")[0].replace("/", ".")
        parts = key.split(".")
        if parts[0] in ("resume", "hydra"):
            continue
        given, kept = _get(composed, parts), _get(saved, parts)
        if given == kept:
            continue
        if _is_free(parts):
            _set(merged, parts, given)
        else:
            contradictions.append(f"{key}={_brief(given)}: the run was made with {_brief(kept)}")
    if contradictions:
        remedy = "leave them out, or start a new run from its weights with init_from=<run folder>"
        raise ConfigError("\n".join(f"{line}; {remedy}" for line in contradictions))
    return {**merged, "resume": composed.get("resume")}


def _is_free(parts: list[str]) -> bool:
    if parts[0] == "loader":
        return len(parts) > 1 and parts[1] in FREE_LOADER_KEYS
    return parts[0] in FREE_KEYS | FREE_GROUPS


def _get(node: Any, parts: list[str]) -> Any:
    for part in parts:
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def _set(node: dict[str, Any], parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        node = node.setdefault(part, {})
    node[parts[-1]] = deepcopy(value)


def _brief(value: Any) -> str:
    return str(value.get("_target_", value)) if isinstance(value, Mapping) else str(value)
