import shutil
from functools import partial
from pathlib import Path

import pytest

from llm.commands.arguments import parse_command_line
from llm.commands.compose import open_hydra
from llm.commands.config_groups import keys_set_by
from llm.commands.newest_run import folder_to_resume
from llm.config.resume import merge_resumed, with_fitting_micro_batch
from llm.errors import ConfigError

FIXTURES = Path(__file__).parent / "fixtures"
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


def test_what_a_device_with_less_memory_needs_may_change():
    saved = {**SAVED, "micro_batch_size": 8, "model": {"activation_checkpointing": False, "d_model": 4}}
    given = {**saved, "micro_batch_size": 2, "model": {"activation_checkpointing": True, "d_model": 4}}
    merged = merge_resumed(saved, given, ["micro_batch_size=2", "model.activation_checkpointing=true"])
    assert (merged["micro_batch_size"], merged["model"]["activation_checkpointing"]) == (2, True)


def test_defaults_that_were_not_given_do_not_replace_saved_values():
    merged = merge_resumed({**SAVED, "seed": 7}, composed(seed=0), ["resume=runs/x"])
    assert merged["seed"] == 7


def test_a_contradiction_is_refused_with_both_values():
    changed = composed(optimizer={"_target_": "llm.optim.lion.Lion", "lr": 1e-4}, seed=3)
    with pytest.raises(ConfigError) as error:
        merge_resumed(SAVED, changed, ["optimizer=lion", "seed=3"])
    assert "optimizer=llm.optim.lion.Lion: the run was made with torch.optim.AdamW" in str(error.value)
    assert "seed=3: the run was made with 0" in str(error.value)


def test_an_unchanged_value_is_no_contradiction():
    assert merge_resumed(SAVED, composed(), ["seed=0", "optimizer.lr=1e-3"])["seed"] == 0


def test_the_same_piece_with_other_settings_is_refused_setting_by_setting():
    changed = composed(optimizer={"_target_": "torch.optim.AdamW", "lr": 2e-3})
    with pytest.raises(ConfigError) as error:
        merge_resumed(SAVED, changed, ["optimizer=adamw", "optimizer.lr=2e-3"])
    assert str(error.value).count("optimizer.lr=0.002: the run was made with 0.001") == 1


@pytest.fixture
def loader():
    with open_hydra(parse_command_line([], "train")) as loader:
        yield loader


def test_an_option_that_sets_keys_of_another_group_is_compared_key_by_key(loader):
    saved = {**SAVED, "model": {"d_model": 128, "ffn": {"d_ff": 5}}}
    given = {**composed(), "model": {"d_model": 384, "ffn": {"d_ff": 5}}}
    keys = partial(keys_set_by, loader=loader)
    with pytest.raises(ConfigError, match=r"model\.d_model=384: the run was made with 128"):
        merge_resumed(saved, given, ["model/size=small"], keys)
    assert (
        merge_resumed(saved, {**composed(), "model": saved["model"]}, ["model/size=tiny"], keys)["model"]
        == saved["model"]
    )


def test_the_keys_of_an_experiment_are_its_own_and_the_groups_it_chooses(loader):
    keys = keys_set_by("experiment", "recall", loader)
    assert {"data", "context_length", "model.ffn.d_ff", "optimizer.lr"} <= set(keys)
    assert keys_set_by("experiment", "nothing", loader) == []


@pytest.mark.parametrize(("devices", "resolved", "size"), [(1, 4, 4), (2, 4, "auto"), (2, None, 4), (2, 2, 4)])
def test_a_micro_batch_size_that_was_found_is_found_again_where_it_does_not_fit(devices, resolved, size):
    trainer = {"devices": devices, "accelerator": "cpu"}
    merged = {"micro_batch_size": 4, "batch_tokens": 128, "context_length": 32, "trainer": trainer}
    found = {} if resolved is None else {"micro_batch_size": resolved}
    assert with_fitting_micro_batch(merged, found)["micro_batch_size"] == size


def test_auto_takes_the_newest_run_of_the_very_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, name in (("1_dense", "dense"), ("2_dense", "dense"), ("3_old_dense", "old_dense"), ("4_dense", "x")):
        run = Path(shutil.copytree(FIXTURES / "run_of_version_0.1", f"runs/{folder}", symlinks=True))
        config = (run / "config.yaml").read_text().replace("name: frozen", f"name: {name}")
        (run / "config.yaml").write_text(config)
    assert folder_to_resume({"resume": "auto", "name": "dense"}) == Path("runs/2_dense")
    with pytest.raises(ConfigError, match="resume=auto: no run named ense with a checkpoint"):
        folder_to_resume({"resume": "auto", "name": "ense"})
