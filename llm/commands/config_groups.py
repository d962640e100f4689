"""Lists the groups and options of conf/ and of further folders in Hydra's search path."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override

NEEDED_GROUPS = ("model", "optimizer", "schedule", "scaling", "tokenizer", "data", "trainer", "callbacks")
"""Groups that a run cannot do without."""


def is_group(name: str, loader: ConfigLoader) -> bool:
    """Return whether a group has this name: `model/attention`."""
    return bool(name) and "." not in name and bool(group_options(name, loader))


def group_options(group: str, loader: ConfigLoader) -> list[str]:
    """Return the options of a group, sorted."""
    return sorted(_listed(group, ObjectType.CONFIG, loader))


def all_groups(loader: ConfigLoader, parent: str = "") -> list[str]:
    """Return every group below `parent`: `model`, `model/attention`, `model/attention/position`, ..."""
    found = []
    for name in _listed(parent, ObjectType.GROUP, loader):
        group = f"{parent}/{name}" if parent else name
        found += [group, *all_groups(loader, group)]
    return found


def _listed(group: str, kind: ObjectType, loader: ConfigLoader) -> list[str]:
    """Return the names in a group of the search path. The loader's own method copies the whole repository per call."""
    assert isinstance(loader, ConfigLoaderImpl)
    return loader.repository.get_group_options(group, kind)


def config_folders(loader: ConfigLoader) -> list[Path]:
    """Return the folders of the search path that lie in the file system."""
    paths = [str(element.path) for element in loader.get_search_path().get_path()]
    return [Path(path.removeprefix("file://")) for path in paths if "://" not in path or path.startswith("file://")]


def unnamed_options(overrides: Iterable[Override], loader: ConfigLoader) -> Iterator[tuple[Override, str]]:
    """Yield each override that removes a needed group or gives a group no option's name, with its problem.

    Hydra would accept such an override and compose a configuration without the group, or with a number in its place.
    """
    for override in overrides:
        group = override.key_or_group
        if not is_group(group, loader) or override.is_sweep_override():
            continue
        text, value = str(override.input_line), None if override.is_delete() else override.value()
        names = value if isinstance(value, list) else [value]
        is_no_name = not override.is_delete() and not all(isinstance(name, str) for name in names)
        options = f"choose one of {', '.join(group_options(group, loader))}"
        if (group in NEEDED_GROUPS or "/" in group) and (override.is_delete() or is_no_name or value == []):
            yield override, f"{text}: {group} is needed; {options}"
        elif is_no_name:
            yield override, f"{text}: names no option; {options}, or write {group}=[] for none"


def options_with(group: str, loader: ConfigLoader) -> list[str]:
    """Return the options, as overrides, that contain a group: `model/ffn=moe` for `model/ffn/router`."""
    parent, _, name = group.rpartition("/")
    found = []
    for option in group_options(parent, loader) if parent else []:
        entries = (_content(parent, option, loader) or {}).get("defaults", [])
        if any(isinstance(entry, dict) and name in entry for entry in entries):
            found.append(f"{parent}={option}")
    return found


def keys_set_by(group: str, option: str, loader: ConfigLoader) -> list[str]:
    """Return the dotted keys that `group=option` sets: those of its file, and the groups that it overrides."""
    content = _content(group, option, loader)
    if content is None:
        return []
    at = content.pop("@package", group.replace("/", "."))
    entries = [entry for entry in content.pop("defaults", []) if isinstance(entry, dict)]
    chosen = [key.removeprefix("override ").lstrip("/").replace("/", ".") for entry in entries for key in entry]
    return [*chosen, *_leaf_keys(content, "" if at == "_global_" else at)]


def _content(group: str, option: str, loader: ConfigLoader) -> dict[str, Any] | None:
    """Return the content of an option's file, with its package header under `@package`; None without such a file."""
    if option not in _listed(group, ObjectType.CONFIG, loader):
        return None
    for folder in config_folders(loader):
        path = folder / group / f"{option}.yaml"
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            header = re.match(r"#\s*@package\s+(\S+)", text)
            return (yaml.safe_load(text) or {}) | ({"@package": header[1]} if header else {})
    return None


def _leaf_keys(node: Any, at: str) -> Iterator[str]:
    if isinstance(node, Mapping) and node and "_target_" not in node:
        for key, value in node.items():
            yield from _leaf_keys(value, f"{at}.{key}" if at else str(key))
    else:
        yield at
