"""Crucible: pretraining of decoder-only language models from pluggable pieces."""

import os

__version__ = "0.1.0"

if os.name != "posix":
    raise SystemExit("error: Crucible needs Linux or macOS; on Windows, run it in the Windows Subsystem for Linux")
