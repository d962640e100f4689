"""Tests that each mistake on a command line is answered in one line with its remedy."""

import pytest

from llm.commands.arguments import parse_command_line
from llm.commands.compose import NotComposedError, compose_checked, compose_with_hydra, plain_part
from llm.config.check import check
from llm.errors import ConfigError


def complaints(*arguments):
    with pytest.raises(ConfigError) as caught:
        compose_with_hydra(parse_command_line(arguments, "train"))
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("optimizer=adamv", "optimizer=adamv: no such option; did you mean adamw?"),
        ("optimiser=adamw", "optimiser: unknown key; did you mean optimizer?"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key; did you mean optimizer.lr?"),
        ("model.d_modle=3", "model.d_modle: unknown key; did you mean model.d_model?"),
        ("model.n_layer=3", "model.n_layer: unknown key; did you mean model.num_layers?"),
        ("modle.d_model=3", "modle: unknown key; did you mean model?"),
        ("modle/size=tiny", "modle/size: unknown key; did you mean model/size?"),
        ("batch_size=3", "batch_size: unknown key; did you mean batch_tokens?"),
        ("run_dir=out", "run_dir: unknown key; did you mean hydra.run.dir?"),
        ("model.num_heads=[1", """not key=value in Hydra's grammar; quote the value: "model.num_heads='[1'\""""),
        ("model.num_heads=1,2", "several values need -m, and a list needs brackets: 'model.num_heads=[1,2]'"),
        ("experiment=optimizerz", "experiment=optimizerz: no such option; did you mean optimizers?"),
        ("averaging=emaa", "averaging=emaa: no such option; did you mean ema?"),
        ("eval=[loss,atention]", "eval=atention: no such option; did you mean attention?; choose one of attention,"),
        ("model/ffn/router=softmax", "model/ffn/router: unknown key; only model/ffn=moe has it"),
        ("hydra/launcher=nowhere", "pip install -e '.[sweep]' brings joblib"),
        ("hydra.run.dirr=x", "hydra.run.dirr: unknown key; did you mean hydra.run.dir?"),
        ("lr=1e-3", "lr: unknown key; did you mean optimizer.lr?"),
        ("num_layers=3", "num_layers: unknown key; did you mean model.num_layers?"),
        ("trainer.profiler=simple", "trainer.profiler: not in its file in conf/; add it with a plus sign"),
        ("+optimizer.lr=1", "+optimizer.lr: exists already; write optimizer.lr=1"),
        ("+optimizer=lion", "optimizer: already chosen; write optimizer=lion"),
        ("~optimizer.nothing", "optimizer.nothing: unknown key"),
        ("max_steps", "max_steps: not key=value; write max_steps=<value>"),
        ("model/size=small2", "model/size=small2: no such option; did you mean small?"),
    ],
)
def test_a_mistake_is_answered_with_what_was_meant(override, answer):
    (complaint,) = complaints(override)
    assert answer in complaint


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (
            ["optimizer=muon", "optimizer.momentm=0.9"],
            "optimizer.momentm: unknown key; did you mean optimizer.momentum?",
        ),
        (
            ["optimizer=muon", "optimizer.betas=[0.9,0.95]"],
            "optimizer.betas: unknown key; did you mean optimizer.aux_betas?",
        ),
        (["trainer=deepspeed", "trainer.stag=2"], "trainer.stag: unknown key; did you mean trainer.stage?"),
        (["data=text", "data.path=book.txt"], "data.path: unknown key; did you mean data.files?"),
        (
            ["model=moe", "model.ffn.num_expert=2"],
            "model.ffn.num_expert: unknown key; did you mean model.ffn.num_experts?",
        ),
        (["optimizer=muon", "aux_betas=[0.9,0.95]"], "aux_betas: unknown key; did you mean optimizer.aux_betas?"),
    ],
)
def test_a_misspelt_key_is_compared_with_the_keys_of_the_chosen_option(arguments, answer):
    (complaint,) = complaints(*arguments)
    assert answer in complaint


def test_all_mistakes_are_found_at_once_and_the_rest_is_checked():
    arguments = ["optimizer=muonn", "modle.d_model=64", "model/norm=xx", "model.norm.eps=1", "x=[1", "batch_tokens=7"]
    with pytest.raises(ConfigError) as caught:
        compose_checked(parse_command_line(arguments, "train"), check)
    found = str(caught.value).splitlines()
    starts = ("optimizer=muonn: no", "modle: unknown", "model/norm=xx: no such", "x=[1: not key", "batch_tokens=7: ")
    assert [any(line.startswith(start) for line in found) for start in starts] == [True] * 5
    assert len(found) == 5  # the settings of an unknown option are not complained about


def test_a_value_under_a_misspelt_key_is_not_reported_as_missing_too():
    with pytest.raises(ConfigError) as caught:
        compose_checked(parse_command_line(["data=text", "data.path=book.txt"], "train"), check)
    assert str(caught.value) == "data.path: unknown key; did you mean data.files?"


def test_what_remains_without_the_mistakes_is_composed():
    with pytest.raises(NotComposedError) as caught:
        compose_with_hydra(parse_command_line(["optimizer=muonn", "seed=3", "lr=1"], "train"))
    remaining = caught.value.remaining()
    assert remaining["optimizer"]["_target_"] == "llm.optim.muon.Muon"
    assert remaining["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--optimizer", "muon"], "--optimizer: settings take no dashes; write optimizer=muon"),
        (["--max-steps=5"], "--max-steps=5: settings take no dashes; write max_steps=5"),
        (["max_steps", "=", "2"], "max_steps = 2: has spaces around the equals sign; write max_steps=2"),
        (["-p", "model"], "--package=model: acts only with --cfg; add --cfg job"),
        (["--config-dir", "nowhere"], "--config-dir=nowhere: no such folder"),
        (["--cfg", "everything"], "--hydra-help lists the flags"),
    ],
)
def test_flags_and_spaces_are_answered_with_the_right_form(arguments, answer):
    with pytest.raises(ConfigError) as caught:
        parse_command_line(arguments, "train")
    (complaint,) = str(caught.value).splitlines()
    assert answer in complaint


@pytest.mark.parametrize("value", ["null", "3", "true"])
def test_a_group_that_gets_no_name_of_an_option_is_answered_with_its_options(value):
    (complaint,) = complaints(f"logger={value}", "seed=1")
    names = "names no option; choose one of csv, tensorboard, wandb, or write logger=[] for none"
    assert complaint == f"logger={value}: {names}"


@pytest.mark.parametrize("argument", ["optimizer=[]", "~optimizer", "~optimizer=adamw", "optimizer=null"])
def test_a_group_that_a_run_needs_cannot_be_removed(argument):
    (complaint,) = complaints(argument)
    assert complaint == f"{argument}: optimizer is needed; choose one of adamw, lion, muon, sgd, tiger"


@pytest.mark.parametrize("argument", ["logger=[]", "~logger", "eval=[loss,samples]", "~optimizer.fused", "name=3"])
def test_optional_groups_and_keys_may_be_removed(argument):
    compose_with_hydra(parse_command_line([argument], "train"))


def test_a_further_folder_adds_options_and_primary_configurations(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    (tmp_path / "own.yaml").write_text("defaults: [train, _self_]\nmax_steps: 3\n")
    for flags in ([f"--config-dir={tmp_path}"], ["-cd", str(tmp_path)], [f"hydra.searchpath=[file://{tmp_path}]"]):
        cfg = plain_part(compose_with_hydra(parse_command_line([*flags, "experiment=mine"], "train")))
        assert cfg["seed"] == 7
    line = parse_command_line(["--config-dir", str(tmp_path), "--config-name", "own"], "train")
    assert plain_part(compose_with_hydra(line))["max_steps"] == 3
    (complaint,) = complaints(f"--config-dir={tmp_path}", "experiment=min")
    assert "experiment=min: no such option; did you mean mine?" in complaint
