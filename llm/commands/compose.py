"""Composes a configuration from conf/ and a command line's overrides."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
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


def value_of(key: str, arguments: Sequence[str]) -> str | None:
    """Return the last value of `key` on a command line as text without quotes, None where it is not given."""
    given = [argument for argument in arguments if argument.lstrip("+").startswith(f"{key}=")]
    if not given:
        return None
    try:
        value = OverridesParser.create().parse_override(given[-1]).value()
    except HydraException:  # text that has to be quoted, taken as it is
        return given[-1].partition("=")[2]
    return value if isinstance(value, str) else given[-1].partition("=")[2]


def default_config(config_name: str) -> Mapping[str, Any]:
    """Return the configuration without overrides, unresolved."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return OmegaConf.to_container(compose(config_name), resolve=False)  # type: ignore[return-value]
