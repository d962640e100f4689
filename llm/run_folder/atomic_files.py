"""Writes a file in one step, so that a reader and a killed process never leave or see a partial file."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"
"""Prefix of the name of a file or folder while it is being written."""


def temporary_path(path: Path, label: str = "") -> Path:
    """Return the sibling of `path` that this process writes before it renames it to `path`.

    The process number keeps two processes that write the same file apart.
    """
    return path.with_name(f"{TEMPORARY}{label}{path.name}-{os.getpid()}")


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step: the file has its former or its new content, flushed to the disk."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def use_default_mode(path: Path) -> None:
    """Give a file the permissions of a file that `open` creates. safetensors gives its files mode 0600.

    The permissions are those of a new file, because reading the umask would change it for other threads.
    """
    probe = temporary_path(path, "mode-")
    probe.touch()
    path.chmod(probe.stat().st_mode & 0o777)
    probe.unlink()


def replace_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write `value` to `path` as JSON in one step."""
    replace_text(path, json.dumps(value, indent=indent) + "\n")


def json_value(value: Any) -> Any:
    """Return `value` in types that JSON has: tensors and NumPy numbers as numbers, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, None where the file is missing or holds no object."""
    try:
        return parse_object(path.read_bytes())
    except OSError:
        return None


def parse_object(line: bytes) -> dict[str, Any] | None:
    """Return the object in a line of JSON, None where the line is incomplete or is no object."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
