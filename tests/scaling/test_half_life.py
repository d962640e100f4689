import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llm.errors import ConfigError
from llm.scaling.half_life import half_life_note, keep_half_life
from llm.training.train import train

ADAMW = {"lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-8}


@given(st.floats(0.05, 20), st.floats(0.1, 10))
def test_half_lives_in_tokens_do_not_change_with_the_batch(ratio, lr_scale):
    kept = keep_half_life(ADAMW, ratio=ratio, lr_scale=lr_scale)
    for old, new in zip(ADAMW["betas"], kept["betas"], strict=True):
        assert ratio * math.log(0.5) / math.log(new) == pytest.approx(math.log(0.5) / math.log(old), rel=1e-9)
    forgotten = ratio / (ADAMW["lr"] * lr_scale * kept["weight_decay"])  # in units of base batches
    assert forgotten == pytest.approx(1 / (ADAMW["lr"] * ADAMW["weight_decay"]), rel=1e-9)


def test_to_first_order_it_is_the_rule_of_the_square_root():
    kept = keep_half_life({**ADAMW, "betas": [0.99, 0.999]}, ratio=4, lr_scale=2)
    assert [1 - b for b in kept["betas"]] == pytest.approx([0.04, 0.004], rel=0.02)
    assert kept["weight_decay"] == pytest.approx(0.2)
    assert kept["eps"] == pytest.approx(0.5e-8)


def test_every_setting_of_the_optimizers_is_adjusted_and_none_stays_none():
    settings = {
        "weight_decay": 0.1,
        "beta": 0.9,
        "momentum": 0.9,
        "row_beta": None,
        "aux_betas": [0.9, 0.9],
        "aux_eps": None,
    }
    kept = keep_half_life(settings, ratio=2, lr_scale=1)
    assert kept == {
        "weight_decay": 0.2,
        "beta": 0.81,
        "momentum": 0.81,
        "row_beta": None,
        "aux_betas": [0.81, 0.81],
        "aux_eps": None,
    }


def test_one_line_describes_the_change_of_the_half_lives():
    kept = keep_half_life(ADAMW, ratio=4, lr_scale=2)
    note = half_life_note(ADAMW, kept, ratio=4, lr_scale=2)
    assert (
        note
        == "half-lives in tokens kept: betas 0.9/0.95 -> 0.656/0.815, eps 1.0e-8 -> 5.0e-9, weight_decay 0.1 -> 0.2"
    )
    note = half_life_note(ADAMW, ADAMW, ratio=4, lr_scale=2)
    assert note == "half-life in tokens of averages x 4, of weight decay x 2"
    assert half_life_note(ADAMW, ADAMW, ratio=1, lr_scale=1) == ""


def test_a_run_at_another_batch_keeps_half_lives_and_its_receipt_states_them(composed, tiny, tmp_path):
    rule = ("scaling=sqrt", "scaling.base_batch_tokens=64", "keep_half_life=true", "max_steps=2")
    train(composed(*tiny, *rule), tmp_path)
    text = (tmp_path / "optimizer.txt").read_text()
    assert (
        "lr 4.0e-3 -> 8.0e-3: sqrt rule, batch 64 -> 256 tokens; half-lives in tokens kept: betas 0.9/0.95 ->" in text
    )
    matrix = next(line for line in text.splitlines() if "q_proj" in line)
    assert " 0.2 " in matrix  # weight decay 0.1 x 4 / 2
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["optimizer"]["betas"] == [0.9, 0.95]
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


def test_a_ramp_and_one_decay_for_the_whole_run_are_refused_together(composed, tiny, tmp_path):
    ramp = ("batch_schedule=doubling", "batch_schedule.every_tokens=128")
    with pytest.raises(ConfigError, match=r"keep_half_life=true: .*batch_schedule"):
        train(composed(*tiny, "keep_half_life=true", *ramp), tmp_path)
