import pytest

from llm.config.check import check
from llm.errors import ConfigError


@pytest.mark.parametrize("trainer", ["cpu", "ddp"])
def test_bf16_weights_without_fp32_masters_are_refused(composed, trainer):
    with pytest.raises(ConfigError, match=r"trainer\.precision=bf16-true: .*without fp32 masters"):
        check(composed(f"trainer={trainer}", "trainer.precision=bf16-true"))


def test_zero_keeps_masters_of_bf16_weights(composed):
    check(composed("trainer=deepspeed", "trainer.accelerator=cpu", "trainer.stage=2", "trainer.precision=bf16-true"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("model.num_heads=3", "optimizer.betas=[2,0.9]"), ["model.num_heads=3", "optimizer.betas=2"]),
        (("optimizer.lr=-1",), ["optimizer.lr=-1: must be above 0"]),
    ],
)
def test_mistakes_in_the_model_and_in_the_optimizer_are_reported_once_each(composed, overrides, expected):
    with pytest.raises(ConfigError) as caught:
        check(composed("optimizer=lion", *overrides))
    lines = str(caught.value).splitlines()
    assert len(lines) == len(expected)
    assert all(any(line.startswith(start) for line in lines) for start in expected)


def test_an_optimizer_setting_without_effect_on_the_model_is_refused_before_training(composed):
    alone = ("model.num_heads=1", "model.num_kv_heads=1", "model.head_dim=128")
    with pytest.raises(ConfigError, match=r"optimizer\.by_head=true"):
        check(composed("optimizer=muon", "optimizer.by_head=true", *alone))
    check(composed("optimizer=muon", "optimizer.by_head=true"))
