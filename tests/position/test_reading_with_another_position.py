"""A trained run read with another position or length, as `eval.py model/position=… context_length=…` does."""

import pytest
from catalogue import CONF
from omegaconf import OmegaConf

from llm.errors import ConfigError
from llm.evaluation import evaluate
from llm.training import train

ASKED = {
    "checkpoint": "last", "evals": ["loss"], "prompts": ["1"], "max_new_tokens": 1, "temperature": 0.0, "top_k": None,
    "top_p": None, "seed": 0, "use_cache": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(composed, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(composed(*tiny, "max_steps=40", "optimizer.lr=1e-2", "val_every=40", "checkpoint_every=40"), folder)
    return folder


def loss(folder, tmp_path, name=None, *, context_length=None, **settings):
    model = None
    if name is not None:
        node = OmegaConf.to_container(OmegaConf.load(CONF / "model/position" / f"{name}.yaml"))
        model = {"position": {**node, **settings}}
    cfg = {"run_dir": str(folder), "model": model, "context_length": context_length, **ASKED}
    return evaluate(cfg, tmp_path)


def test_a_position_that_equals_the_trained_one_gives_the_same_loss(trained, tmp_path):
    own = loss(trained, tmp_path)
    for name, settings in (("rope", {}), ("ntk", {"factor": 1.0}), ("rerope", {"window": 1000})):
        assert loss(trained, tmp_path, name, **settings) == pytest.approx(own, abs=1e-6)


def test_another_position_gives_another_loss(trained, tmp_path):
    own = loss(trained, tmp_path)
    assert abs(loss(trained, tmp_path, "none") - own) > 1e-3
    assert abs(loss(trained, tmp_path, "ntk", factor=16.0) - own) > 1e-5


def test_windows_may_be_longer_than_in_training(trained, tmp_path):
    length = OmegaConf.load(trained / "config.yaml").context_length
    longer = loss(trained, tmp_path, "rerope", window=length // 2, context_length=4 * length)
    assert longer != pytest.approx(loss(trained, tmp_path), abs=1e-6)


def test_a_position_with_a_mistake_is_refused_by_name(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.position\.window=0"):
        loss(trained, tmp_path, "rerope", window=0)
    with pytest.raises(ConfigError, match=r"model\.position\.windo=3: unknown key; did you mean window"):
        loss(trained, tmp_path, "rerope", windo=3)
    with pytest.raises(ConfigError, match="context_length=0"):
        loss(trained, tmp_path, context_length=0)
