"""Keeps torch's compiler from being imported where nothing is compiled; the import takes as long as that of torch."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo"
EXCLUDED = "__dynamo_disable"
"""Attribute in which torch keeps the form of a function that the compiler must not trace, once it has made one."""


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Run a block in which nothing is compiled, without importing the compiler.

    Optimizers of torch import the compiler to exclude their methods from it. Here a stand-in answers that a method is
    excluded as it is. Nothing changes where the compiler is imported already. A library that asks for another part of
    the compiler, as DeepSpeed does, gets the compiler itself.
    """
    if COMPILER in sys.modules:
        yield
        return
    excluded: list[Any] = []
    stand_in = sys.modules[COMPILER] = torch._dynamo = _stand_in(excluded)
    try:
        yield
    finally:
        for function in excluded:  # the compiler excludes them itself when it is imported
            if hasattr(function, EXCLUDED):
                delattr(function, EXCLUDED)
        if sys.modules.get(COMPILER) is stand_in:
            _forget_compiler()


def _forget_compiler() -> None:
    for name in [name for name in sys.modules if name == COMPILER or name.startswith(f"{COMPILER}.")]:
        del sys.modules[name]
    del torch._dynamo


def _stand_in(excluded: list[Any]) -> ModuleType:
    def disable(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        excluded.append(function)
        return function

    def import_compiler(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(COMPILER) is module:
            _forget_compiler()
        return getattr(importlib.import_module(COMPILER), name)

    module = ModuleType(COMPILER)
    module.__getattr__ = import_compiler  # type: ignore[method-assign]
    module.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]  # its configuration can be imported alone
    module.disable, module.graph_break = disable, lambda *_: None  # type: ignore[attr-defined]
    return module
