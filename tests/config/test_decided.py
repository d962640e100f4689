import pytest

from llm.config.check import check
from llm.config.decided import DECIDED
from llm.errors import ConfigError

OPTIONS = {
    "model.ffn": ("model=moe",),
    "model.first_ffn": ("model=moe",),
    "model.attention": ("model/attention=vq", "model/position=none"),
}
"""Options of a group that have the pieces below it."""
SETTINGS = [(path, key) for path, keys in DECIDED.items() for key in keys]


@pytest.mark.parametrize(("path", "key"), SETTINGS, ids=[f"{path}.{key}" for path, key in SETTINGS])
def test_a_setting_that_another_key_decides_is_refused_with_that_key(composed, path, key):
    cfg = composed(*OPTIONS.get(path.rpartition(".")[0], ()), *OPTIONS.get(path, ()))
    node = cfg
    for part in path.split("."):
        node = node[part]
    node[key] = 2
    with pytest.raises(ConfigError) as error:
        check(cfg)
    assert f"{path}.{key}=2: has no effect here; {DECIDED[path][key]}" in str(error.value).splitlines()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(composed, seed):
    with pytest.raises(ConfigError, match=rf"seed={seed}: must lie in \[0, 4294967296\)"):
        check(composed(f"seed={seed}"))


@pytest.mark.parametrize(
    "own",
    [
        ("data=text", "data.files={}/a.txt", "data.val_files={}/b.txt"),
        ("data=synthetic", "data.num_val_documents=9"),
        ("data=python", "data.val_modules=[json]"),
        ("data=hf", "data.path=a/b", "data.val_split=validation"),
    ],
    ids=lambda own: own[0],
)
def test_a_share_to_hold_out_is_refused_with_a_validation_set_of_the_user(composed, tmp_path, own):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("text")
    settings = [text.format(tmp_path) for text in own]
    check(composed(*settings))  # the default share is nobody's choice
    check(composed(*settings[:-1], "loader.val_fraction=0.1"))
    with pytest.raises(ConfigError, match=r"loader\.val_fraction=0\.1: the data has a validation set of its own"):
        check(composed(*settings, "loader.val_fraction=0.1"))


@pytest.mark.parametrize("setting", ["averaging.decay=0.9", "spikes.sigma=3"])
def test_a_setting_of_a_group_without_an_option_is_refused(composed, setting):
    group = setting.partition(".")[0]
    with pytest.raises(ConfigError, match=rf"{setting}: no option reads it; choose one first, as in {group}=<option>"):
        check(composed(f"+{setting}"))


@pytest.mark.parametrize("key", ["max_steps", "seed", "name", "batch_tokens", "loader", "trainer.precision"])
def test_a_deleted_key_that_every_run_needs_is_named(composed, key):
    with pytest.raises(ConfigError, match=rf"(?m)^{key}: missing; every run needs it"):
        check(composed(f"~{key}"))
