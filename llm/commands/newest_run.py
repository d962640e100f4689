"""Finds the run folder that `resume` names."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm.config.files import load
from llm.errors import ConfigError
from llm.run_folder.checkpoint_files import list_checkpoints

RUNS = Path("runs")
"""Folder in which `resume=auto` looks, where conf/train.yaml puts new runs."""


def folder_to_resume(cfg: Mapping[str, Any]) -> Path | None:
    """Return the folder of the run that a configuration resumes, None for a new run.

    Raises:
        ConfigError: the folder has no config.yaml, or no run fits `resume=auto`.
    """
    resume = cfg.get("resume")
    if resume in (None, ""):
        return None
    folder = _newest_run(str(cfg.get("name"))) if resume == "auto" else Path(str(resume)).expanduser()
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"resume={folder}: holds no config.yaml; name a run folder, such as runs/<folder>")
    return folder


def _newest_run(name: str) -> Path:
    """Return the newest run folder in `RUNS` whose config.yaml has this name and which has a checkpoint."""
    for file in sorted(RUNS.glob("*/config.yaml"), reverse=True):
        if not file.parent.name.endswith(f"_{name}") or load(file).get("name") != name:
            continue
        if list_checkpoints(file.parent / "checkpoints"):
            return file.parent
        sys.stderr.write(f"resume=auto: skipped {file.parent}, which ended before its first checkpoint\n")
    raise ConfigError(f"resume=auto: no run named {name} with a checkpoint in {RUNS}/; name its folder instead")
