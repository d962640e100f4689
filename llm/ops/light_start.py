"""Keeps torch's compiler from being imported where nothing is compiled; the import takes as long as that of torch."""

import contextlib
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
    excluded as it is. Nothing changes where the compiler is imported already.
    """
    if COMPILER in sys.modules:
        yield
        return
    excluded: list[Any] = []
    sys.modules[COMPILER] = _stand_in(excluded)
    torch._dynamo = sys.modules[COMPILER]
    try:
        yield
    finally:
        for function in excluded:  # the compiler excludes them itself when it is imported
            if hasattr(function, EXCLUDED):
                delattr(function, EXCLUDED)
        for name in [name for name in sys.modules if name == COMPILER or name.startswith(f"{COMPILER}.")]:
            del sys.modules[name]
        del torch._dynamo


def _stand_in(excluded: list[Any]) -> ModuleType:
    def disable(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        excluded.append(function)
        return function

    module = ModuleType(COMPILER)
    module.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]  # its configuration can be imported alone
    module.disable, module.graph_break = disable, lambda *_: None  # type: ignore[attr-defined]
    return module
