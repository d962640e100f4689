import contextlib
import json
import math

import pytest
import torch

from llm.config.build import build_model
from llm.config.check import check
from llm.config.files import load
from llm.errors import ConfigError
from llm.objective.next_token import NextToken
from llm.scaling.noise_estimate import PROBE_REMEDY
from llm.training import start as training
from llm.training.noise_probe import measure_noise_scale
from llm.training.train import train

PROBED = ("scaling=sign", "scaling.base_batch_tokens=128", "model.dropout=0.1", "callbacks.samples=null")
"""A batch of 256 tokens, and a probe at half of it."""


def losses(folder):
    return [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def probed(composed, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed")
    train(composed(*tiny, *PROBED, "max_steps=4"), folder)
    return folder


def test_the_result_of_the_probe_is_saved_and_kept_by_a_resumed_run(composed, tiny, probed, monkeypatch):
    found = load(probed / "config.yaml")["scaling"]["noise_scale"]
    assert 1 < found < math.inf
    assert f"noise scale {found:.3g}" in (probed / "optimizer.txt").read_text()
    monkeypatch.setattr(training, "measure_noise_scale", lambda *a, **k: pytest.fail("measured again"))
    train({**load(probed / "config.yaml"), "resume": str(probed), "max_steps": 6}, probed)
    assert load(probed / "config.yaml")["scaling"]["noise_scale"] == found
    assert len(losses(probed)) == 6


def test_a_probe_does_not_change_the_run_apart_from_its_number(composed, tiny, probed, tmp_path):
    found = load(probed / "config.yaml")["scaling"]["noise_scale"]
    train(composed(*tiny, *PROBED, f"scaling.noise_scale={found}", "max_steps=4"), tmp_path)
    assert losses(tmp_path) == losses(probed)[:4]


def test_there_is_no_probe_where_no_rate_depends_on_it(composed, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "measure_noise_scale", lambda *a, **k: pytest.fail("measured"))
    train(composed(*tiny, "scaling=sign", "max_steps=2"), tmp_path)
    assert load(tmp_path / "config.yaml")["scaling"]["noise_scale"] == "measured"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("scaling.base_batch_tokens=32",), "scaling.base_batch_tokens=32 must hold at least two windows"),
        (("scaling.base_batch_tokens=100",), "scaling.base_batch_tokens=100 must hold at least two windows"),
        (("scaling.base_batch_tokens=null",), "scaling.base_batch_tokens=None: must be at least 1"),
        (
            ("optimizer=tiger", "optimizer.accumulate=momentum", "trainer.gradient_clip_val=null"),
            "optimizer.accumulate=momentum leaves no gradients to measure; set optimizer.accumulate=buffer",
        ),
    ],
)
def test_a_probe_that_could_not_measure_is_refused_before_anything_is_built(composed, tiny, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check(composed(*tiny, *PROBED, *overrides))


def test_a_probe_without_data_finds_no_noise_scale_and_names_the_setting(composed, tiny):
    with pytest.raises(ConfigError, match=f"scaling.noise_scale=measured: 32 updates of 8 windows .*; {PROBE_REMEDY}"):
        measure_noise_scale(
            build_model(composed(*tiny), 64),
            objective=NextToken(vocab_size=64, bos_id=0),
            seed=0,
            windows=(),
            read=lambda numbers: pytest.fail("read"),
            windows_per_update=8,
            micro_batch_size=2,
            build_optimizer=lambda model: torch.optim.AdamW(model.parameters()),
            lr_factor=lambda step: 1.0,
            clip=None,
            autocast=contextlib.nullcontext,
        )


def test_a_device_without_memory_for_the_probe_is_reported_with_the_setting(composed, tiny, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training, "measure_noise_scale", full)
    with pytest.raises(ConfigError, match=f"which has no room for it; {PROBE_REMEDY}"):
        train(composed(*tiny, *PROBED), tmp_path)
