import pytest

from llm.errors import ConfigError
from llm.resume import merge_resumed

SAVED = {
    "max_steps": 10,
    "seed": 0,
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3},
    "loader": {"num_workers": 0},
}


def composed(**changes):
    return {**SAVED, "resume": "runs/x", **changes}


def test_what_does_not_change_the_training_is_taken_from_the_command_line():
    merged = merge_resumed(
        SAVED, composed(max_steps=20, loader={"num_workers": 2}), ["max_steps=20", "loader.num_workers=2"]
    )
    assert merged["max_steps"] == 20
    assert merged["loader"]["num_workers"] == 2
    assert merged["resume"] == "runs/x"


def test_defaults_that_were_not_given_do_not_replace_saved_values():
    merged = merge_resumed({**SAVED, "seed": 7}, composed(seed=0), ["resume=runs/x"])
    assert merged["seed"] == 7


def test_a_contradiction_is_refused_with_both_values():
    changed = composed(optimizer={"_target_": "llm.optim.lion.Lion", "lr": 1e-4}, seed=3)
    with pytest.raises(ConfigError) as error:
        merge_resumed(SAVED, changed, ["optimizer=lion", "seed=3"])
    assert "optimizer=llm.optim.lion.Lion: the run was made with torch.optim.AdamW" in str(error.value)
    assert "seed=3: the run was made with 0" in str(error.value)


def test_a_value_repeated_as_it_was_is_no_contradiction():
    assert merge_resumed(SAVED, composed(), ["seed=0", "optimizer.lr=1e-3"])["seed"] == 0
