"""Records what made a run: package versions, the commit of the code, and a hash of the configuration."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "lightning", "hydra-core", "numpy", "deepspeed")


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine a run's results, without importing the packages."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package.removesuffix("-core")] = importlib.metadata.version(package)
    return found


def git_commit(folder: str | os.PathLike[str] | None = None) -> str | None:
    """Return the commit of the code, with `-dirty` where files differ from it. Return None outside a checkout."""
    command = ["git", "-C", str(folder or Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    command.append("--exclude=*")
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def config_hash(config: Mapping[str, Any]) -> str:
    """Return a short hash of a configuration, which does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]
