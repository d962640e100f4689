"""Suggests the key that a user meant."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from llm.config.pieces import piece_signature
from llm.config.signatures import HYDRA_KEYS, is_allowed, meant_key
from llm.config.source_signatures import read_signature
from llm.errors import did_you_mean

MAX_PLACES = 4
"""Most keys that a suggestion lists, where a last name exists in several groups."""


class UnknownKey(NamedTuple):
    """An unknown key: the line that a user reads, and the key that was probably meant."""

    problem: str
    meant: str | None


def unknown_key(key: str, config: Mapping[str, Any], groups: Collection[str]) -> UnknownKey:
    """Return the complaint about a key that the chosen options lack.

    Args:
        key: a dotted key, or a group with slashes.
        config: the configuration of the chosen options, Hydra's own part included.
        groups: names of all groups.
    """
    if "/" in key:
        remedy = did_you_mean(key, groups) or f"; the groups are {', '.join(sorted(groups))}"
        return UnknownKey(f"{key}: unknown key{remedy}", None)
    *parents, last = key.split(".")
    node: Any = config
    for depth, parent in enumerate(parents):
        if not isinstance(node, Mapping) or parent not in node:
            return _unknown(parents[: depth + 1], [*parents[depth + 1 :], last], config, node)
        node = node[parent]
    if isinstance(node, Mapping) and last in _parameters(node):
        return UnknownKey(f"{key}: not in its file in conf/; add it with a plus sign, as in +{key}=<value>", f"+{key}")
    return _unknown([*parents, last], [], config, node)


def _unknown(path: list[str], rest: list[str], config: Mapping[str, Any], node: Any) -> UnknownKey:
    """Compare the last part of `path` with its sibling names, and with the last parts of all keys."""
    key, last = ".".join(path), path[-1]
    names = [str(name) for name in node if name not in HYDRA_KEYS] if isinstance(node, Mapping) else []
    places = [] if rest else _places(last, config)
    near = meant_key(last, names)
    if near is not None and not (len(path) == 1 and places):
        meant = near if near.startswith("hydra.") else ".".join([*path[:-1], near])
        return UnknownKey(f"{key}: unknown key; did you mean {meant}?", ".".join([meant, *rest]))
    if places:
        several = " or ".join(places[:MAX_PLACES])
        return UnknownKey(f"{key}: unknown key; did you mean {several}?", places[0] if len(places) == 1 else None)
    return UnknownKey(f"{key}: unknown key; known keys: {', '.join(sorted(names)) or 'none'}", None)


def _places(name: str, node: Any, path: str = "") -> list[str]:
    """Return the dotted paths below `node` whose last part is `name`, the shortest first; Hydra's own are excluded."""
    return sorted(_find(name, node, path), key=lambda place: (place.count("."), place))


def _find(name: str, node: Any, path: str) -> Iterator[str]:
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        place = f"{path}.{key}" if path else str(key)
        if key == name and path:
            yield place
        if place != "hydra":
            yield from _find(name, value, place)


def _parameters(node: Mapping[str, Any]) -> set[str]:
    target = str(node.get("_target_"))
    if not is_allowed(target):
        return set()
    signature = read_signature(target) or piece_signature(target)  # reading the source takes no import of torch
    return set() if signature is None else set(signature.parameters)
