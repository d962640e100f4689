"""Which precision and device `auto` means, on machines that this one emulates."""

import logging

import pytest
import torch

from llm.config.build import build_trainer
from llm.config.check import check
from llm.errors import ConfigError
from llm.ops import precision


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_gpu_that_only_emulates_bf16_trains_in_fp32_and_says_so(native, expected, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: f"GPU {native}")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    with caplog.at_level(logging.WARNING):
        assert precision.resolve_precision("auto", accelerator="cuda") == expected
    assert ("32-true" in caplog.text) is not native


def test_auto_never_takes_an_apple_gpu_and_mps_is_refused(composed, tiny, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.accelerators.mps.MPSAccelerator.is_available", lambda: True)
    kept = [override for override in tiny if not override.startswith("trainer")]
    checked = check(composed(*kept, "trainer=auto"))
    trainer = build_trainer(checked.tree, checked.sizes, logger=False, enable_progress_bar=False)
    assert type(trainer.accelerator).__name__ == ("CUDAAccelerator" if torch.cuda.is_available() else "CPUAccelerator")
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=mps: is not supported"):
        check(composed(*kept, "trainer=auto", "trainer.accelerator=mps"))
