"""Reads and writes config.yaml."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from llm.config.renamed import with_named_loggers, with_present_targets
from llm.errors import ConfigError


def to_plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration as plain, resolved dicts and lists."""
    if isinstance(cfg, DictConfig):
        return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]
    return dict(cfg)


def save(cfg: Mapping[str, Any], path: Path) -> None:
    """Write a plain configuration as YAML."""
    path.write_text(yaml.safe_dump(dict(cfg), sort_keys=False, allow_unicode=True))


def load(path: Path) -> dict[str, Any]:
    """Return a configuration that this or an older version saved, with present `_target_`s.

    Raises:
        ConfigError: the file is missing, or is not a mapping.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: not found; name a run folder, which has a config.yaml")
    cfg = yaml.safe_load(path.read_text())
    if not isinstance(cfg, dict):
        raise ConfigError(f"{path}: not a configuration; name a run folder that train.py made")
    return with_named_loggers(with_present_targets(cfg))
