"""`compile=auto` on a CPU: the run's length against the time that a compilation takes on this machine."""

import json
import os
from types import SimpleNamespace

import pytest

from llm.config.build import build_model
from llm.config.check import check
from llm.ops.kernel_choice import KERNELS
from llm.ops.tuning import remembered
from llm.training import compilation, kernel_timing
from llm.training.compilation import (
    GAIN,
    GRAPHS,
    UNKNOWN_SECONDS,
    UTILIZATION,
    CompileClock,
    CompiledDecoder,
    keep_code_by_machine,
)
from llm.training.module import LanguageModule
from llm.training.train import train

RATE = 1e9


@pytest.fixture
def pays(composed, tiny, tmp_path, monkeypatch):
    """Return whether a run of so many seconds is compiled, on a machine with a known rate."""
    monkeypatch.setattr(compilation, "measured_matmul_flops", lambda dtype: RATE)
    monkeypatch.setattr(compilation, "has_compiler", lambda: True)

    def answer(seconds, *overrides):
        checked = check(composed(*tiny, *overrides))
        decoder = CompiledDecoder.of(checked, build_model(checked.tree, 300))
        flops = seconds * UTILIZATION * RATE
        return compilation.pays_to_compile(checked, decoder, flops=flops, cache=tmp_path), decoder

    return answer


def test_a_run_is_compiled_once_its_gain_exceeds_the_time_of_compilations(pays, tmp_path):
    limit = GRAPHS * UNKNOWN_SECONDS / GAIN
    assert not pays(0.99 * limit)[0]
    is_compiled, decoder = pays(1.01 * limit)
    assert is_compiled
    times = iter([5.0, 17.0])
    clock = CompileClock(decoder=decoder, cache=tmp_path, now=lambda: next(times))
    for _ in range(3):  # the first update alone is timed
        clock.on_train_batch_start()
        clock.on_train_batch_end(SimpleNamespace(is_global_zero=True))
    assert remembered(tmp_path, decoder) == {"seconds": 12.0}
    assert pays(1.01 * GRAPHS * 12 / GAIN)[0]
    assert not pays(0.99 * GRAPHS * 12 / GAIN)[0]
    assert not pays(1.01 * GRAPHS * 12 / GAIN, "model.num_layers=3")[0]  # another decoder has not been timed


def test_a_ramp_or_a_missing_compiler_keeps_a_run_eager(pays, monkeypatch):
    ramp = ("batch_schedule=stages", "batch_schedule.starts=[0,256]", "batch_schedule.shares=[0.5,1]")
    assert not pays(1e9, *ramp)[0]
    monkeypatch.setattr(compilation, "has_compiler", lambda: False)
    assert not pays(1e9)[0]


def test_compiled_code_is_kept_apart_by_instruction_set(tmp_path, monkeypatch):
    folders = []
    for isa in ("AVX2", "AVX512_CORE"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        keep_code_by_machine(tmp_path)
        folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folders[0] != folders[1]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "own")
    keep_code_by_machine(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "own"


def test_a_compiled_run_is_recorded_and_its_resumption_is_compiled_too(composed, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_timing, "WORTHWHILE_FLOPS", 0)
    monkeypatch.setattr(kernel_timing, "measure", lambda operations: {})
    monkeypatch.setattr(kernel_timing, "pays_to_compile", lambda *_, **__: True)
    compiled = []
    monkeypatch.setattr(LanguageModule, "compile_model", lambda self: compiled.append(self))
    run = tmp_path / "run"
    train(composed(*tiny, "max_steps=2", "trainer=cpu"), run)
    assert json.loads((run / "summary.json").read_text())[KERNELS]["graph"] == "compiled"
    monkeypatch.setattr(kernel_timing, "pays_to_compile", lambda *_, **__: False)
    train(composed(*tiny, "max_steps=4", "trainer=cpu", f"resume={run}"), run)
    assert len(compiled) == 2
    train(composed(*tiny, "max_steps=6", "trainer=cpu", "compile=false", f"resume={run}"), run)
    train(composed(*tiny, "max_steps=2", "trainer=cpu"), tmp_path / "other")
    assert len(compiled) == 2
