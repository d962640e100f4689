"""Converts a plain mapping to the dataclass of a command, and reports every mistake in it."""

from collections.abc import Mapping
from dataclasses import MISSING as DEFAULTLESS
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

from llm.config.signatures import MISSING, fits, suggest, type_name
from llm.errors import ConfigError

Settings = TypeVar("Settings")


def settings(kind: type[Settings], given: Mapping[str, Any]) -> Settings:
    """Return the dataclass `kind` with the values of `given`.

    Raises:
        ConfigError: keys are unknown, missing or ill-typed; the message has one line for each.
    """
    hints = get_type_hints(kind)
    names = {field.name: field.default is not DEFAULTLESS for field in fields(kind)}  # type: ignore[arg-type]
    problems = [f"{key}={given[key]}: unknown key{suggest(key, names)}" for key in given if key not in names]
    for name, has_default in names.items():
        if given.get(name, MISSING) == MISSING:
            if name in given or not has_default:
                problems.append(f"{name}: a value is needed; add {name}=… to the command")
        elif not fits(given[name], hints[name]):
            problems.append(f"{name}={given[name]!r}: must be {type_name(hints[name])}")
    if problems:
        raise ConfigError("\n".join(problems))
    return kind(**given)
