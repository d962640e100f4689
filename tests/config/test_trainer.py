import pytest

from llm.config.check import check
from llm.errors import ConfigError


@pytest.mark.parametrize("trainer", ["cpu", "ddp"])
def test_bf16_weights_without_fp32_masters_are_refused(composed, trainer):
    with pytest.raises(ConfigError, match=r"trainer\.precision=bf16-true: .*without fp32 masters"):
        check(composed(f"trainer={trainer}", "trainer.precision=bf16-true"))


def test_zero_keeps_masters_of_bf16_weights(composed):
    check(composed("trainer=deepspeed", "trainer.accelerator=cpu", "trainer.stage=2", "trainer.precision=bf16-true"))
