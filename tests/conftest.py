import copy
from typing import Any

import pytest
import torch
from catalogue import CONF
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from llm.config import to_plain


@pytest.fixture(scope="session")
def composed():
    """Compose `conf/train.yaml` with overrides into a plain dict; each answer is a fresh copy."""
    cache: dict[tuple[str, ...], dict[str, Any]] = {}

    def make(*overrides: str) -> dict[str, Any]:
        if overrides not in cache:
            GlobalHydra.instance().clear()
            with initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = compose("train", overrides=["name=test", *overrides])
                OmegaConf.resolve(cfg)
                cache[overrides] = to_plain(cfg)
        return copy.deepcopy(cache[overrides])

    return make


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
