import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from llm.callbacks.noise_scale import NoiseScale
from llm.config.build import build_callbacks
from llm.config.files import load
from llm.config.sizes import batch_plan
from llm.errors import ConfigError
from llm.optim.param_groups import parameter_kinds
from llm.scaling.noise_estimate import SmoothedNoiseScale, two_batch_estimate
from llm.training import module_and_trainer
from llm.training.train import train

MEASURE = ("callbacks=noise_scale", "callbacks.samples=null", "callbacks.curves=null", "micro_batch_size=2")


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class ByHand(Callback):
    """Takes each micro-batch's gradient apart from the running sum, and computes the estimates from whole tensors."""

    found: list[dict[str, float]]

    def on_train_start(self, trainer, pl_module):
        self.smoothed, self.found, self.parts, self.before = SmoothedNoiseScale(decay=0.99), [], [], None
        self.kinds = parameter_kinds(pl_module.model)

    def on_after_backward(self, trainer, pl_module):
        held = {n: p.grad.clone() for n, p in pl_module.model.named_parameters() if n in self.kinds}
        whole = {n: 4 * (g - (self.before[n] if self.parts else 0.0)) for n, g in held.items()}  # 4 micro-batches
        self.parts.append(whole)
        self.before = held

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for kind in [*set(self.kinds.values()), "all"]:
            names = [n for n, its in self.kinds.items() if kind in (its, "all")]
            small = sum(sum(float(part[n].square().sum()) for n in names) for part in self.parts) / 4
            big = sum(float(self.before[n].square().sum()) for n in names)
            signal, trace = two_batch_estimate(small, big, small=64, big=256)
            self.smoothed.update(kind, signal=signal, trace=trace)
        self.found.append({kind: self.smoothed.value(kind) for kind in self.smoothed.averages})
        self.parts = []


def test_it_is_what_whole_gradients_give_by_kind_and_in_all(composed, tiny, tmp_path, monkeypatch):
    hand = ByHand()
    monkeypatch.setattr(module_and_trainer, "build_callbacks", lambda *a, **k: [*build_callbacks(*a, **k), hand])
    train(composed(*tiny, *MEASURE, "trainer.precision=32-true"), tmp_path)
    rows = rows_of(tmp_path)
    assert len(rows) == len(hand.found) == 8
    for row, found in zip(rows, hand.found, strict=True):
        for kind, value in found.items():
            name = "noise_scale" if kind == "all" else f"noise_scale/{kind}"
            # differences of sums of micro-batches lose digits in fp32
            assert row.get(name) == (None if value is None else pytest.approx(value, rel=1e-3))
    assert rows[-1]["noise_scale"] > 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["noise_scale"] == pytest.approx(rows[-1]["noise_scale"])
    assert summary["updates_over_minimum"] == pytest.approx(1 + summary["noise_scale"] / 256)


def test_measuring_changes_nothing_and_continues_after_a_resumption(composed, tiny, tmp_path):
    measured, plain, whole, first = (tmp_path / name for name in ("measured", "plain", "whole", "first"))
    for folder in (measured, plain, whole, first):
        folder.mkdir()
    train(composed(*tiny, *MEASURE), measured)
    train(composed(*tiny, "callbacks.samples=null", "micro_batch_size=2"), plain)
    assert [r["train/loss"] for r in rows_of(measured)] == [r["train/loss"] for r in rows_of(plain)]
    train(composed(*tiny, *MEASURE, "schedule=constant", "schedule.warmup=0"), whole)
    cfg = composed(*tiny, *MEASURE, "schedule=constant", "schedule.warmup=0")
    train({**cfg, "max_steps": 4}, first)
    train({**cfg, "resume": str(first)}, first)
    assert rows_of(first)[-1]["noise_scale"] == rows_of(whole)[-1]["noise_scale"]


def test_only_every_so_many_updates_are_measured(composed, tiny, tmp_path):
    train(composed(*tiny, *MEASURE, "callbacks.noise_scale.every=3"), tmp_path)
    assert {row["step"] for row in rows_of(tmp_path) if any("noise_scale" in key for key in row)} <= {3, 6}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every": 0}, r"callbacks\.noise_scale\.every=0: must be at least 1"),
        ({"decay": 1.0}, r"callbacks\.noise_scale\.decay=1\.0"),
        ({"accumulation": 1}, "one micro-batch on one device.*set micro_batch_size to half"),
    ],
)
def test_what_cannot_be_measured_is_an_error_that_says_what_to_set(wrong, message):
    with pytest.raises(ConfigError, match=message):
        NoiseScale(**{"every": 1, "decay": 0.99, "accumulation": 2, "world_size": 1, **wrong})
    NoiseScale(every=1, decay=0.99, accumulation=1, world_size=2)  # two devices are enough


def test_an_automatic_micro_batch_leaves_two_to_compare(composed, tiny, tmp_path):
    cfg = composed(*tiny, "callbacks=noise_scale", "micro_batch_size=auto", "max_steps=2")
    assert batch_plan(cfg).accumulation == 2
    assert batch_plan({**cfg, "callbacks": None}).accumulation == 1
    train(cfg, tmp_path)
    assert load(tmp_path / "config.yaml")["micro_batch_size"] == 4  # of 8 windows


def test_an_optimizer_that_leaves_no_gradients_is_refused_when_training_starts(composed, tiny, tmp_path):
    folding = ("optimizer=tiger", "optimizer.accumulate=momentum", "trainer.gradient_clip_val=null")
    with pytest.raises(ConfigError, match=r"callbacks\.noise_scale: .*optimizer\.accumulate=buffer"):
        train(composed(*tiny, *MEASURE, *folding), tmp_path)
    assert torch.is_grad_enabled()
