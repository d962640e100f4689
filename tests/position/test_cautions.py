"""Settings of positions that are valid but cannot act as their names say are reported once, with the remedy."""

import logging
import re

import pytest

from llm.config.build import build_model
from llm.training.train import train

SMALL = ("model.d_model=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=2", "model.ffn.d_ff=16")


@pytest.fixture
def cautions(composed):
    def find(*overrides, context_length=256, is_training=True):
        model = build_model(composed(*SMALL, f"context_length={context_length}", *overrides), 50)
        return model.cautions(context_length=context_length, is_training=is_training)

    return find


def log_n(mode, length):
    return (f"model.position.log_n={mode}", f"model.position.train_length={length}")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("model/position=inv_leaky", "model.position.train_length=128"), r"train_length=128: .*context_length=256"),
        (("model/position=inv_leaky", "model.position.window=16"), r"window=16: .*set model.position.window=64"),
        (("model/position=inv_leaky", "model.position.window=160"), r"window=160: .*set model.position.window=64"),
        (("model/position=inv_leaky", "model.position.window=256"), r"window=256: context_length=256 holds no pair"),
        (("model/position=rope", *log_n("full", 256), "model.attention.window=32"), r"log_n=full: .*window=32 hides"),
        (("model/position=rope", *log_n("clipped", 256)), r"log_n=clipped: scales no query"),
        (("model/position=rerope",), r"model.position=ReRoPE: .*train with model/position=rope"),
        (("model/position=leaky_rerope",), r"model.position=LeakyReRoPE: .*train with model/position=rope"),
    ],
)
def test_a_setting_that_cannot_act_in_training_is_reported_once(cautions, overrides, reason):
    (line,) = cautions(*overrides)
    assert re.search(reason, line)


@pytest.mark.parametrize("position", ["rerope", "leaky_rerope"])
def test_a_window_that_no_distance_reaches_is_reported_in_evaluation(cautions, position):
    chosen = f"model/position={position}"
    (beyond,) = cautions(chosen, "model.position.window=256", is_training=False)
    assert "context_length=256 holds no pair of tokens that far apart" in beyond
    (hidden,) = cautions(chosen, "model.attention.window=32", is_training=False)
    assert "model.position.window=64: model.attention.window=32 hides every key that far" in hidden
    assert not cautions(chosen, is_training=False)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model/position=rope",),
        ("model/position=inv_leaky",),
        ("model/position=none", *log_n("full", 256)),
        ("model/attention=vq", "model/position=rerope"),
        ("model=hybrid",),
    ],
)
def test_settings_that_act_are_not_reported(cautions, overrides):
    assert cautions(*overrides) == []


def test_a_hybrid_reports_only_the_layers_whose_window_hides_the_far_view(cautions):
    lines = cautions("model=hybrid", "model/position=rerope", "model.position.window=100", is_training=False)
    assert len(lines) == 1
    assert lines[0].startswith("model.position.window=100: model.attention.window=96 hides every key that far")


def test_a_training_run_logs_the_report(composed, tiny, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(composed(*tiny, "model/position=rerope", "model.position.window=5", "max_steps=1"), tmp_path)
    assert "model.position=ReRoPE: a model trained with it does not read longer contexts" in caplog.text
