"""Reads the signature of a piece from its source, so that a configuration is checked without importing Lightning.

Lightning and what it imports take several seconds. Its trainer, its callbacks and ours are named by almost every
configuration, but only training calls them.
"""

import ast
import builtins
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from llm.config.piece_signature import Signature

IMPORTS_LIGHTNING = ("lightning.", "llm.callbacks.", "llm.distributed.deepspeed_trainer.", "data.data_module.")
"""Prefixes of the pieces whose modules import Lightning."""

IMPORTED = ("typing", "collections", "pathlib", "datetime", "types", "os")
"""Modules of the standard library whose names an annotation may use; they are imported."""

MOST_HOPS = 8
"""Imports that are followed from one module to the next before the search gives up."""


class _AnyClass(type):
    def __getattr__(cls, name: str) -> Any:
        return cls


class _Unread(metaclass=_AnyClass):
    """A stand-in in annotations for a class that is not imported."""

    def __class_getitem__(cls, item: Any) -> Any:
        return cls


class _Names(dict):
    """The names that an annotation of a module may use, each read when it is first needed."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __missing__(self, name: str) -> Any:
        module, node = _find(self.module, name)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            return _evaluate(node.value, module)
        if node is None and module.split(".")[0] in IMPORTED:
            return getattr(importlib.import_module(module), name, _Unread)
        return getattr(builtins, name, _Unread)


@cache
def read_signature(target: str) -> Signature | None:
    """Return the signature of what a `_target_` names, read from its source; None where it cannot be read."""
    module, _, name = target.rpartition(".")
    module, node = _find(module, name)
    if isinstance(node, ast.FunctionDef) and not node.decorator_list:
        members = _attributes(node.name, module)
        if "__signature__" in members:  # the module computes it
            return None
        return replace(_signature(node.args, module, is_method=False), members=members)
    if not isinstance(node, ast.ClassDef):
        return None
    classes = list(_with_bases(node, module))
    bodies = [(member, where) for one, where in classes if one is not None for member in one.body]
    members = frozenset(name for member, _ in bodies for name in _defined(member))
    for member, where in bodies:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return replace(_signature(member.args, where, is_method=True), module=module, members=members)
    if any(one is None or one.decorator_list for one, _ in classes):
        return None
    return Signature(parameters={}, hints={}, is_open_ended=False, module=module, members=members)


def _signature(given: ast.arguments, module: str, *, is_method: bool) -> Signature:
    positional = [*given.posonlyargs, *given.args]
    required = len(positional) - len(given.defaults)
    arguments = [(a, n < required, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n, a in enumerate(positional)]
    arguments = arguments[is_method:]
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        arguments.append((argument, default is None, inspect.Parameter.KEYWORD_ONLY))
    return Signature(
        parameters={
            a.arg: inspect.Parameter(a.arg, kind, default=inspect.Parameter.empty if is_required else None)
            for a, is_required, kind in arguments
        },
        hints={a.arg: _evaluate(a.annotation, module) for a, _, _ in arguments if a.annotation is not None},
        is_open_ended=given.kwarg is not None,
        module=module,
        members=frozenset(),
    )


def _evaluate(annotation: ast.expr, module: str) -> Any:
    """Return the value of an annotation, with stand-ins for classes that are not imported."""
    try:
        return _value(annotation, _Names(module))
    except TypeError:  # an operation that a stand-in does not have
        return _Unread


def _value(node: ast.expr, names: _Names) -> Any:
    """Return the value of a part of an annotation; a stand-in for an expression that annotations do not use."""
    match node:
        case ast.Name():
            return names[node.id]
        case ast.Constant():
            return node.value
        case ast.Attribute():
            return getattr(_value(node.value, names), node.attr)
        case ast.Subscript():
            return _value(node.value, names)[_value(node.slice, names)]
        case ast.BinOp(op=ast.BitOr()):
            return _value(node.left, names) | _value(node.right, names)
        case ast.Tuple():
            return tuple(_value(part, names) for part in node.elts)
        case ast.List():
            return [_value(part, names) for part in node.elts]
        case _:
            return _Unread


def _with_bases(node: ast.ClassDef, module: str) -> Iterator[tuple[ast.ClassDef | None, str]]:
    """Yield a class and its bases, each with its module, nearest first; None for a base whose source is not found."""
    yield node, module
    for base in node.bases:
        where, found = _find(module, base.id) if isinstance(base, ast.Name) else (module, None)
        if isinstance(found, ast.ClassDef):
            yield from _with_bases(found, where)
        else:
            yield None, where


def _defined(member: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement in the body of a class defines."""
    if isinstance(member, ast.FunctionDef | ast.ClassDef):
        yield member.name
    elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name) and member.value is not None:
        yield member.target.id
    elif isinstance(member, ast.Assign):
        yield from (target.id for target in member.targets if isinstance(target, ast.Name))


def _attributes(function: str, module: str) -> frozenset[str]:
    """Return the attributes that a module sets on one of its functions."""
    targets = (target for node in _statements(module) if isinstance(node, ast.Assign) for target in node.targets)
    found = (t for t in targets if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name))
    return frozenset(target.attr for target in found if ast.unparse(target.value) == function)


def _find(module: str, name: str) -> tuple[str, ast.stmt | None]:
    """Return the module that defines a name and its statement there, following imports of single names."""
    for _ in range(MOST_HOPS):
        for node in _statements(module):
            if isinstance(node, ast.ImportFrom):
                alias = next((a for a in node.names if (a.asname or a.name) == name), None)
                if alias is not None:
                    module, name = _absolute(node, module), alias.name
                    break
            elif name in _defined(node):
                return module, node
        else:
            return module, None
    return module, None


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return str(node.module)
    is_package = _file(module).name == "__init__.py"
    parts = module.split(".")[: len(module.split(".")) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


@cache
def _statements(module: str) -> tuple[ast.stmt, ...]:
    """Return the statements of a module, those under `if` and `try` included; none where it has no source."""
    if module.split(".")[0] in IMPORTED:
        return ()
    file = _file(module)
    if not file.is_file():
        return ()
    found, waiting = [], list(ast.parse(file.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop(0)
        found.append(node)
        if isinstance(node, ast.If | ast.Try):
            waiting[:0] = node.body
    return tuple(found)


@cache
def _folders(package: str) -> tuple[str, ...]:
    """Return the folders of a package at the top level, without importing it."""
    spec = importlib.util.find_spec(package)
    return tuple((spec.submodule_search_locations if spec else None) or ())


@cache
def _file(module: str) -> Path:
    """Return the file of a module without importing it; a file that does not exist where there is none."""
    first, *rest = module.split(".")
    for folder in _folders(first):
        path = Path(folder, *rest)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return file
    return Path(module)
