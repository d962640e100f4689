import json

import pytest
import torch
from catalogue import options
from lightning.pytorch.callbacks import Callback

from llm.callbacks.optimizer_stats import OptimizerStats
from llm.config.build import build_callbacks
from llm.errors import ConfigError
from llm.optim.param_groups import parameter_kinds
from llm.training import module_and_trainer
from llm.training.train import train

NODE = (
    "+callbacks.optimizer_stats={_target_: llm.callbacks.optimizer_stats.OptimizerStats, "
    "every: 2, orthogonality_samples: 3}"
)


def metrics_of(composed, tiny, tmp_path, *overrides):
    short = ("max_steps=4", "val_every=4", "checkpoint_every=4", "callbacks.samples=null", "logger=csv")
    train(composed(*tiny, *short, NODE, *overrides), tmp_path)
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", options("optimizer"))
def test_every_second_update_reports_what_each_kind_did(composed, tiny, tmp_path, name):
    rows = {row["step"]: row for row in metrics_of(composed, tiny, tmp_path, f"optimizer={name}")}
    for step, row in rows.items():
        assert ("optimizer/update_rms/matrix" in row) == (step % 2 == 0)
    for kind in ("matrix", "embedding", "vector"):
        assert rows[4][f"optimizer/update_rms/{kind}"] > 0
        ratio = rows[4][f"optimizer/update_rms/{kind}"] / rows[4][f"optimizer/weight_rms/{kind}"]
        assert rows[4][f"optimizer/update_ratio/{kind}"] == pytest.approx(ratio, rel=1e-4)
        assert rows[4][f"optimizer/grad_norm/{kind}"] > 0
    squares = sum(v**2 for k, v in rows[4].items() if k.startswith("optimizer/grad_norm/"))
    assert squares**0.5 == pytest.approx(rows[4]["grad_norm"], rel=1e-3)
    assert ("optimizer/orthogonality_error/matrix" in rows[4]) == (name == "muon")
    if name == "muon":
        assert rows[4]["optimizer/orthogonality_error/matrix"] < 0.6


class ByHand(Callback):
    """Takes each kind's tensors together, whatever groups they are in."""

    def on_train_start(self, trainer, pl_module):
        self.kinds, self.found = parameter_kinds(pl_module.model), []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = dict(pl_module.model.named_parameters())
        self.before = {name: named[name].detach().clone() for name in self.kinds}
        self.gradients = {name: named[name].grad.clone() for name in self.kinds}

    def on_train_batch_end(self, trainer, pl_module, *_):
        named, row = dict(pl_module.model.named_parameters()), {}
        for kind in set(self.kinds.values()):
            names = [name for name, its in self.kinds.items() if its == kind]
            move = torch.cat([(self.before[n] - named[n].detach()).flatten() for n in names])
            weight = torch.cat([named[n].detach().flatten() for n in names])
            row[f"optimizer/update_rms/{kind}"] = float(move.square().mean().sqrt())
            row[f"optimizer/weight_rms/{kind}"] = float(weight.square().mean().sqrt())
            row[f"optimizer/update_ratio/{kind}"] = float(move.norm() / weight.norm())
            row[f"optimizer/grad_norm/{kind}"] = float(torch.cat([self.gradients[n].flatten() for n in names]).norm())
        self.found.append(row)


@pytest.mark.parametrize("rates", ["spectral", "mup"])
def test_a_kind_whose_tensors_have_several_rates_is_counted_as_one(composed, tiny, tmp_path, monkeypatch, rates):
    hand = ByHand()
    monkeypatch.setattr(module_and_trainer, "build_callbacks", lambda *a, **k: [*build_callbacks(*a, **k), hand])
    rows = metrics_of(
        composed, tiny, tmp_path, f"rates={rates}", "rates.base_d_model=16", "micro_batch_size=8", "optimizer=muon"
    )
    receipt = (tmp_path / "optimizer.txt").read_text().splitlines()
    several = {line.split()[-3] for line in receipt if ("matrix" if rates == "spectral" else "vector") in line.split()}
    assert len(several) > 1, "there is but one group"
    for row, found in zip(rows, hand.found, strict=True):
        if row["step"] % 2 == 0:
            assert {key: row[key] for key in found} == pytest.approx(found, rel=1e-4)  # sums of fp32 in another order
    assert rows[-1]["optimizer/orthogonality_error/matrix"] < 0.6


@pytest.mark.parametrize("wrong", [{"every": 0}, {"orthogonality_samples": 0}])
def test_settings_out_of_range_are_errors(wrong):
    with pytest.raises(ConfigError, match="must be at least 1"):
        OptimizerStats(**({"every": 1, "orthogonality_samples": 1} | wrong))
