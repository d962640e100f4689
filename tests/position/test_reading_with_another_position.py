"""A trained run evaluated with another position or length, as `eval.py model/position=… context_length=…` does."""

import pytest
from catalogue import CONF
from omegaconf import OmegaConf

from llm.commands.evaluate import evaluate
from llm.errors import ConfigError
from llm.training.train import train


@pytest.fixture(scope="module")
def trained(composed, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(composed(*tiny, "max_steps=40", "optimizer.lr=1e-2", "val_every=40", "checkpoint_every=40"), folder)
    return folder


@pytest.fixture
def loss(judging, tmp_path):
    def measure(folder, name=None, *, context_length=None, **settings):
        cfg = judging(f"run_dir={folder}", "eval=[loss]") | {"context_length": context_length}
        if name is not None:
            node = OmegaConf.to_container(OmegaConf.load(CONF / "model/position" / f"{name}.yaml"))
            cfg["model"] = {"position": {**node, **settings}}
        return evaluate(cfg, tmp_path)

    return measure


def test_a_position_that_equals_the_trained_one_gives_the_same_loss(trained, loss):
    own = loss(trained)
    for name, settings in (("rope", {}), ("ntk", {"factor": 1.0}), ("rerope", {"window": 1000})):
        assert loss(trained, name, **settings) == pytest.approx(own, abs=1e-6)


def test_another_position_gives_another_loss(trained, loss):
    own = loss(trained)
    assert abs(loss(trained, "none") - own) > 1e-3
    assert abs(loss(trained, "ntk", factor=16.0) - own) > 1e-5


def test_windows_may_be_longer_than_in_training(trained, loss):
    length = OmegaConf.load(trained / "config.yaml").context_length
    longer = loss(trained, "rerope", window=length // 2, context_length=4 * length)
    assert longer != pytest.approx(loss(trained), abs=1e-6)


def test_a_position_with_a_mistake_is_refused_by_name(trained, loss):
    with pytest.raises(ConfigError, match=r"model\.position\.window=0"):
        loss(trained, "rerope", window=0)
    with pytest.raises(ConfigError, match=r"model\.position\.windo=3: unknown key; did you mean window"):
        loss(trained, "rerope", windo=3)
    with pytest.raises(ConfigError, match="context_length=0"):
        loss(trained, context_length=0)


def test_a_position_that_turns_another_share_than_in_training_is_refused(trained, loss):
    with pytest.raises(ConfigError, match=r"rotary_share=0\.5: this run was trained with 1\.0; set model\.position"):
        loss(trained, "rerope", rotary_share=0.5)
    with pytest.raises(ConfigError, match=r"turn_values=True: this run was trained with False"):
        loss(trained, "ntk", turn_values=True)
