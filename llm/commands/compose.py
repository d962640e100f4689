"""Composes a configuration from conf/ and a command line's overrides."""

from collections.abc import Mapping
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from llm.config.conf import conf_folder
from llm.config.files import to_plain

CONFIG_DIR = conf_folder()


def compose_plain(config_name: str, overrides: list[str]) -> dict[str, Any]:
    """Return the plain configuration that the overrides compose to; Hydra's own part is kept by HydraConfig."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose(config_name, overrides=overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        OmegaConf.set_struct(cfg, False)
        cfg.pop("hydra")
        plain = to_plain(cfg)
    GlobalHydra.instance().clear()
    return plain


def default_config(config_name: str) -> Mapping[str, Any]:
    """Return the configuration without overrides, unresolved."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return OmegaConf.to_container(compose(config_name), resolve=False)  # type: ignore[return-value]
