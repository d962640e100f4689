"""Numbers that must never be applied or saved, and the records of them."""

import json

import pytest
import torch

from llm.callbacks.bad_steps import FILE
from llm.commands.replay import ReplayConfig, replay
from llm.errors import ConfigError, NonFiniteError
from llm.run_folder.checkpoint import load_model
from llm.training.module import LanguageModule
from llm.training.train import train

SHORT = ("max_steps=8", "checkpoint_every=5", "val_every=8", "callbacks.samples=null", "trainer.precision=32-true",
         "micro_batch_size=2", "schedule=constant")  # fmt: skip


@pytest.fixture
def run(composed, tiny, tmp_path):
    def make(*overrides):
        train(composed(*tiny, *SHORT, *overrides), tmp_path / "run")
        return tmp_path / "run"

    return make


def disturb(monkeypatch, change, *, step, micro_step=None):
    """Have `change` applied to the loss of one step, or of one micro-batch in it."""
    plain = LanguageModule.training_step

    def disturbed(self, batch, batch_idx):
        loss = plain(self, batch, batch_idx)
        if self.global_step != step - 1 or micro_step not in (None, batch_idx % self.trainer.accumulate_grad_batches):
            return loss
        losses = self._update._pending["train/loss"]
        losses[-1] = change(losses[-1])
        return change(loss)

    monkeypatch.setattr(LanguageModule, "training_step", disturbed)


def noted(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_the_step_that_is_not_finite_is_written_down_and_can_be_replayed(run, monkeypatch, tmp_path):
    disturb(monkeypatch, lambda loss: loss * float("inf"), step=7, micro_step=1)
    with pytest.raises(NonFiniteError, match="at step 7"):
        run()
    (line,) = noted(tmp_path / "run")
    assert (line["step"], line["why"], line["loss"]) == (7, "not finite", "inf")
    assert [part["loss"] == "inf" for part in line["micro_batches"]] == [False, True, False, False]
    assert all(first <= last for part in line["micro_batches"] for first, last in part["documents"])
    monkeypatch.undo()
    windows = replay(ReplayConfig(run_dir=str(tmp_path / "run"), step=7))
    assert [found.window for found in windows] == [w for part in line["micro_batches"] for w in part["windows"]]
    assert all(found.bad == "" for found in windows)  # the fault was ours, not the windows'


def test_a_replayed_step_has_the_loss_that_was_recorded(run):
    folder = run()
    recorded = next(r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["step"] == 6)
    windows = replay(ReplayConfig(run_dir=str(folder), step=6))  # the checkpoint of step 5 has the very weights
    mean = sum(found.loss for found in windows) / len(windows)
    assert mean == pytest.approx(recorded["train/loss"], rel=1e-5)  # fp32, summed in another order
    with pytest.raises(ConfigError, match="step=9: the run has steps 1 to 8"):
        replay(ReplayConfig(run_dir=str(folder), step=9))
    with pytest.raises(ConfigError, match="no checkpoint before it"):
        replay(ReplayConfig(run_dir=str(folder), step=3))


def test_the_first_module_that_is_not_finite_is_named(run, monkeypatch):
    folder = run()
    plain = LanguageModule.__init__

    def broken(self, **arguments):
        plain(self, **arguments)
        self.model.layers[1].ffn.up_proj.register_forward_hook(lambda module, inputs, output: output / 0)

    monkeypatch.setattr(LanguageModule, "__init__", broken)
    assert {found.bad for found in replay(ReplayConfig(run_dir=str(folder), step=6))} == {"layers.1.ffn.up_proj"}


def test_a_spike_is_skipped_and_recorded_and_ordinary_updates_are_applied(run, monkeypatch):
    disturb(monkeypatch, lambda loss: loss * 100, step=6)
    folder = run("spikes=skip", "spikes.window=4", "max_steps=6", "val_every=6")
    states = [load_model(folder / f"checkpoints/step-0000000{step}") for step in (5, 6)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    (line,) = noted(folder)
    assert line["step"] == 6
    assert "sigma above" in line["why"]
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("spiked_steps") for row in rows] == [None] * 5 + [1.0]


def test_a_guard_that_could_not_act_is_refused(run):
    with pytest.raises(ConfigError, match=r"spikes=skip: optimizer\.accumulate=momentum leaves no gradient"):
        run("optimizer=tiger", "optimizer.accumulate=momentum", "trainer.gradient_clip_val=null", "spikes=skip")
    with pytest.raises(ConfigError, match=r"spikes\.sigma=-1"):
        run("spikes=skip", "spikes.sigma=-1")
