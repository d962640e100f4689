"""Merges the saved configuration of a run with a command line that resumes it, and refuses contradictions."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from llm.config.sizes import world_size
from llm.errors import ConfigError

FREE_KEYS = frozenset(
    {"resume", "max_steps", "max_tokens", "val_every", "checkpoint_every", "plan", "on_nonfinite", "micro_batch_size"}
)
FREE_GROUPS = frozenset({"logger", "callbacks", "trainer", "hydra", "spikes", "eval"})
FREE_LOADER_KEYS = frozenset({"num_workers", "cache_dir", "num_processes"})

RESOLVED_FROM_AUTO = "resolved_from_auto"
"""Key of summary.json with the values that a run found for settings given as `auto`."""


def with_fitting_micro_batch(merged: Mapping[str, Any], resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resumed configuration whose micro-batch size is `auto` again where the found one does not fit.

    A size that fits is kept, since sums in another order would change the losses.

    Args:
        merged: the configuration of the resumed run, for the devices of this command.
        resolved: values that the run found for settings given as `auto`.
    """
    size = merged["micro_batch_size"]
    if size == "auto" or resolved.get("micro_batch_size") != size:
        return dict(merged)
    windows = merged["batch_tokens"] // merged["context_length"]
    return {**merged, "micro_batch_size": size if windows % (size * world_size(merged["trainer"])) == 0 else "auto"}


def merge_resumed(
    saved: Mapping[str, Any],
    composed: Mapping[str, Any],
    overrides: Iterable[str],
    keys_of: Callable[[str, str], Iterable[str]] = lambda group, option: (),
) -> dict[str, Any]:
    """Return the saved configuration with those overrides that do not change what was trained.

    Args:
        saved: configuration of the run folder.
        composed: what this command line composes to.
        overrides: this command line's overrides, `key=value` or `group=option`.
        keys_of: dotted keys that `group=option` sets where the group has no key of its own: `model/size=small` sets
            `model.d_model` and others, and an experiment may set any key.

    Raises:
        ConfigError: overrides that contradict the saved run, all of them with both values.
    """
    merged = deepcopy(dict(saved))
    contradictions = []
    for override in overrides:
        name, _, option = override.lstrip("+~").partition("=")
        group = name.split("@")[0]
        key = group.replace("/", ".")
        if key.split(".")[0] in ("resume", "hydra"):
            continue
        own = [key] if _get(composed, key.split(".")) is not None or _get(saved, key.split(".")) is not None else []
        for each in own or keys_of(group, option) or [key]:
            parts = each.split(".")
            given, kept = _get(composed, parts), _get(saved, parts)
            if given == kept:
                continue
            if _is_free(parts):
                _set(merged, parts, given)
            else:
                contradictions += [
                    f"{where}={a}: the run was made with {b}" for where, a, b in _differ(each, given, kept)
                ]
    if contradictions:
        remedy = "remove these settings, or start a new run from its weights with init_from=<run folder>"
        raise ConfigError("\n".join(f"{line}; {remedy}" for line in dict.fromkeys(contradictions)))
    return {**merged, "resume": composed.get("resume")}


def _differ(key: str, given: Any, kept: Any) -> Iterator[tuple[str, str, str]]:
    """Yield (key, given, kept) where two values differ: another piece as one, the same piece setting by setting."""
    both = isinstance(given, Mapping) and isinstance(kept, Mapping)
    if not both or given.get("_target_") != kept.get("_target_"):
        yield key, _brief(given), _brief(kept)
        return
    for name in [*given, *(name for name in kept if name not in given)]:
        if given.get(name) != kept.get(name):
            yield from _differ(f"{key}.{name}", given.get(name), kept.get(name))


def _is_free(parts: list[str]) -> bool:
    if parts[0] == "loader":
        return len(parts) > 1 and parts[1] in FREE_LOADER_KEYS
    if parts[0] == "model":
        return parts[1:] == ["activation_checkpointing"]
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
