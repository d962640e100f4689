"""The signature of a piece, as far as a configuration is compared with it."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints


@dataclass(frozen=True, kw_only=True)
class Signature:
    """The signature of a class or function.

    Args:
        parameters: its parameters by name, without *args and **kwargs.
        hints: their types by name, as far as they can be resolved.
        is_open_ended: whether it takes further keywords.
        module: the module that defines it.
        members: names that the class defines; empty for a function.
    """

    parameters: Mapping[str, inspect.Parameter]
    hints: Mapping[str, Any]
    is_open_ended: bool
    module: str
    members: frozenset[str]


def keyword_parameters(function: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function or a class by name, following *args/**kwargs wrappers to the original."""
    parameters = inspect.signature(function).parameters
    return {
        name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY)
    }


def signature_of(function: Any) -> Signature:
    """Return the signature of an imported class or function."""
    return Signature(
        parameters=keyword_parameters(function),
        hints=_type_hints(function),
        is_open_ended=any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()),
        module=str(getattr(function, "__module__", "")),
        members=frozenset(dir(function)),
    )


def _type_hints(function: Any) -> dict[str, Any]:
    constructor = function.__init__ if inspect.isclass(function) else function
    try:
        return get_type_hints(inspect.unwrap(constructor))
    except (NameError, TypeError):  # a library's own forward references: nothing to hold the value against
        return {}
