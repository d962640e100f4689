import pytest
from catalogue import CONF
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException

from llm.commands.overrides import as_if_meant, diagnose, not_overrides


@pytest.fixture
def complaint(composed):
    def make(*overrides):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(HydraException) as error:
            compose("train", overrides=list(overrides))
        return diagnose(error.value, composed(), CONF)

    return make


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("optimizer=adamv", "optimizer=adamv: no such option; did you mean adamw?"),
        ("optimiser=adamw", "optimiser: unknown key; did you mean optimizer?"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key; did you mean lr?"),
        ("model.d_modle=3", "model.d_modle: unknown key; did you mean d_model?"),
        ("model.n_layer=3", "model.n_layer: unknown key; did you mean num_layers?"),
        ("modle.d_model=3", "modle: unknown key; did you mean model?"),
        ("modle/size=tiny", "modle/size: unknown key; did you mean model/size?"),
        ("batch_size=3", "batch_size: unknown key; did you mean batch_tokens?"),
        ("run_dir=out", "run_dir: unknown key; did you mean hydra.run.dir?"),
        ("model.num_heads=[1", "model.num_heads=[1: not key=value"),
        ("model.num_heads=1,2", "--multirun"),
        ("experiment=optimizerz", "experiment=optimizerz: no such option; did you mean optimizers?"),
        ("averaging=emaa", "averaging=emaa: no such option; did you mean ema?"),
        ("eval=[loss,atention]", "eval=atention: no such option; did you mean attention?; choose one of attention,"),
        ("model/ffn/router=softmax", "model/ffn/router: unknown key; only model/ffn=moe has it"),
        ("hydra/launcher=nowhere", "pip install -e '.[sweep]' brings joblib"),
    ],
)
def test_a_mistake_on_the_command_line_is_answered_with_what_was_meant(complaint, override, answer):
    assert answer in complaint(override)


def test_dashes_are_answered_with_the_right_form():
    assert not_overrides(["--optimizer", "muon"], CONF) == [
        "--optimizer: settings take no dashes; write optimizer=muon"
    ]
    assert not_overrides(["--max-steps=5"], CONF) == ["--max-steps=5: settings take no dashes; write max_steps=5"]
    assert not_overrides(["-m", "optimizer=adamw,lion"], CONF) == []
    assert not_overrides([], CONF) == []


@pytest.mark.parametrize("value", ["null", "3", "true"])
def test_a_group_that_gets_no_name_of_an_option_is_answered_with_its_options(value):
    (complaint,) = not_overrides([f"logger={value}", "seed=null", "logger.x=null"], CONF)
    names = "names no option; choose one of csv, tensorboard, wandb, or write logger=[] for none"
    assert complaint == f"logger={value}: {names}"


@pytest.mark.parametrize("argument", ["optimizer=[]", "~optimizer", "~optimizer=adamw", "optimizer=null"])
def test_a_group_that_a_run_needs_cannot_be_left_out(argument):
    (complaint,) = not_overrides([argument], CONF)
    assert complaint == f"{argument}: optimizer cannot be left out; choose one of adamw, lion, muon, sgd, tiger"


@pytest.mark.parametrize("argument", ["logger=[]", "~logger", "eval=[loss,samples]", "~optimizer.fused", "name=3"])
def test_what_can_be_left_out_may_be(argument):
    assert not_overrides([argument], CONF) == []


@pytest.mark.parametrize(
    ("overrides", "complaint", "rest"),
    [
        (
            ["optimizer=muonn", "seed=1"],
            "optimizer=muonn: no such option; did you mean muon?",
            ["optimizer=muon", "seed=1"],
        ),
        (["model/norm=xx", "model.norm.eps=1", "seed=1"], "model/norm=xx: no such option; choose one of", ["seed=1"]),
        (["modle.d_model=3", "model.d_model=3"], "modle: unknown key; did you mean model?", ["model.d_model=3"]),
        (["+optimiser=lion", "lr=1"], "optimiser: unknown key; did you mean optimizer?", ["lr=1"]),
        (["x=[1", "seed=1"], "x=[1: not key=value; quote values", ["seed=1"]),
        (["seed=1,2", "x=1"], "Ambiguous value for argument 'seed=1,2'\n1. To use", ["x=1"]),
        (["seed=1"], "something else", ["seed=1"]),
    ],
)
def test_what_a_complaint_is_about_is_taken_as_meant_or_left_out_to_find_the_other_mistakes(overrides, complaint, rest):
    assert as_if_meant(overrides, complaint) == rest
