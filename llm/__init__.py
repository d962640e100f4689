"""Crucible: pretraining of decoder-only language models from pluggable pieces.

The names below are the surface for Python, described in docs/python.md. Each is loaded when it is first used, so that
`import llm` loads no torch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if os.name != "posix":
    raise SystemExit("error: Crucible needs Linux or macOS; on Windows, run it in the Windows Subsystem for Linux")

if TYPE_CHECKING:
    from llm.api.configuration import compose
    from llm.api.run_comparison import compare
    from llm.api.run_view import Run, open_run
    from llm.api.standalone import build
    from llm.api.train_in_process import train_in_process as train
    from llm.errors import ConfigError, CrucibleError

__all__ = ["ConfigError", "CrucibleError", "Run", "build", "compare", "compose", "open_run", "train"]

_PLACES = {
    "ConfigError": ("llm.errors", "ConfigError"),
    "CrucibleError": ("llm.errors", "CrucibleError"),
    "Run": ("llm.api.run_view", "Run"),
    "build": ("llm.api.standalone", "build"),
    "compare": ("llm.api.run_comparison", "compare"),
    "compose": ("llm.api.configuration", "compose"),
    "open_run": ("llm.api.run_view", "open_run"),
    "train": ("llm.api.train_in_process", "train_in_process"),
}
"""The module of each exported name, and its name there."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'llm' has no attribute {name!r}")
    module, own_name = _PLACES[name]
    globals()[name] = getattr(importlib.import_module(module), own_name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
