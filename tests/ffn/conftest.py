from typing import Any

import pytest
from catalogue import CONF
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf


@pytest.fixture(scope="session")
def build_ffn():
    """Build the model's feed-forward from overrides of its node, e.g. `build_ffn("moe", "top_k=1", d_model=16)`."""

    def build(name: str, *overrides: str, d_model: int) -> Any:
        GlobalHydra.instance().clear()
        groups = [f"model/ffn/{o}" for o in overrides if o.split("=")[0] in ("router", "balance")]
        values = [f"model.ffn.{o}" for o in overrides if o.split("=")[0] not in ("router", "balance")]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", overrides=["name=test", f"model/ffn={name}", *groups, *values])
        return instantiate(OmegaConf.to_container(cfg.model.ffn, resolve=True), _convert_="all")(d_model=d_model)

    return build
