"""Rollback to the last valid checkpoint, with the windows since then excluded."""

import json
import shutil

import pytest
import torch

from data.data_module import TokenDataModule
from data.sampler import run_windows
from llm.callbacks.bad_steps import FILE
from llm.commands.replay import ReplayConfig, replay
from llm.errors import CheckpointError, ConfigError, SpikeError
from llm.run_folder.checkpoint import load_model
from llm.run_folder.rollback import FILE as ROLLBACKS
from llm.training.module import LanguageModule
from llm.training.step_guard import StepGuard
from llm.training.train import train

SHORT = ("spikes=rollback", "spikes.window=3", "spikes.sigma=1e3", "max_steps=10", "checkpoint_every=3", "val_every=10",
         "callbacks.samples=null", "callbacks.checkpoints.keep=9")  # fmt: skip
WINDOWS = 8
"""Windows an update of these runs."""


@pytest.fixture(scope="module")
def trained(composed, tiny):
    def make(folder, *overrides, resume=False):
        train({**composed(*tiny, *SHORT, *overrides), "resume": str(folder) if resume else None}, folder)
        return folder

    return make


@pytest.fixture
def run(trained, tmp_path):
    return lambda name, *overrides, **options: trained(tmp_path / name, *overrides, **options)


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """A run that went back once: at step 5 to the checkpoint of step 3, past numbers 24 to 39."""
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, not_a_number, numbers=[38])
        return trained(tmp_path_factory.mktemp("back") / "whole")


@pytest.fixture
def as_killed(whole, tmp_path):
    """A copy of that run as it would stand, had it been killed after a checkpoint."""

    def make(step):
        folder = shutil.copytree(whole, tmp_path / "killed", symlinks=True)
        for later in (folder / "checkpoints").glob("step-*"):
            if int(later.name.removeprefix("step-")) > step:
                shutil.rmtree(later)
        for link in ("last", "best"):
            (folder / "checkpoints" / link).unlink(missing_ok=True)
        return folder

    return make


def spoil(monkeypatch, change, *, numbers):
    """Have `change` applied to the loss of every update that reads one of these numbers of the run."""
    plain, order = LanguageModule.training_step, {}

    def spoiled(self, batch, batch_idx):
        loss, data = plain(self, batch, batch_idx), self.trainer.datamodule
        if "bad" not in order:
            kept = {"num_windows": data.num_windows, "seed": data.seed}
            order["bad"] = {int(run_windows(number, number + 1, **kept)[0]) for number in numbers}
        if not order["bad"] & set(data.windows_of_step(self.global_step)):
            return loss
        losses = self._update._pending["train/loss"]
        losses[-1] = change(losses[-1])
        return change(loss)

    monkeypatch.setattr(LanguageModule, "training_step", spoiled)


def never_saw(monkeypatch, *spans):
    """Have every run leave these numbers out from its beginning."""
    plain = TokenDataModule.__init__

    def without(self, **arguments):
        plain(self, **arguments)
        self.leave_out(spans)

    monkeypatch.setattr(TokenDataModule, "__init__", without)


def noted(folder):
    return json.loads((folder / ROLLBACKS).read_text())


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return {row["step"]: row["train/loss"].hex() for row in rows(folder)}


def weights(folder):
    return load_model((folder / "checkpoints/last").resolve())


def same(one, other):
    a, b = weights(one), weights(other)
    return losses(one) == losses(other) and all(torch.equal(a[name], b[name]) for name in a)


def not_a_number(loss):
    return loss * float("nan")


def far_too_high(loss):
    return loss * 1000


RAMP = ("batch_schedule=doubling", "batch_schedule.start_share=0.5", "batch_schedule.every_tokens=512")


@pytest.mark.parametrize(
    ("change", "overrides"),
    [
        (not_a_number, ("model.dropout=0.1", "micro_batch_size=2")),
        (far_too_high, ("model=moe", "model.ffn.num_experts=4", "optimizer=muon")),
        (far_too_high, ("model/attention=vq", "model/position=none", "averaging=ema", *RAMP)),
    ],
    ids=["not a number, dropout", "a spike, experts, muon", "a spike, codes, an average, a ramp"],
)
def test_a_run_that_went_back_equals_one_that_never_saw_those_windows(run, monkeypatch, change, overrides):
    spoil(monkeypatch, change, numbers=[38])
    folder = run("back", *overrides)
    (entry,) = noted(folder)
    monkeypatch.undo()
    never_saw(monkeypatch, entry["left_out"])
    assert entry["left_out"][0] <= 38 < entry["left_out"][1]
    assert same(folder, run("never", *overrides))
    assert [row.get("rollbacks") for row in rows(folder)] == [None] * entry["to"] + [1.0] * (10 - entry["to"])
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["rollbacks"]) == ("finished", 1)


def test_excluded_windows_reach_from_the_checkpoint_to_the_chosen_number_of_updates_past_the_spike(
    run, monkeypatch, caplog
):
    spoil(monkeypatch, far_too_high, numbers=[38])
    with caplog.at_level("WARNING"):
        (entry,) = noted(run("back", "spikes.past=2"))
    assert entry["why"].startswith("loss=")
    assert (entry["step"], entry["to"], entry["left_out"]) == (5, 3, [3 * WINDOWS, (5 + 2) * WINDOWS])
    assert "rolled back to step 3, windows 24 to 55 of the run are excluded; rollback 1 of at most 10" in caplog.text


def test_several_rollbacks_accumulate_their_excluded_windows(run, monkeypatch):
    spoil(monkeypatch, not_a_number, numbers=[38, 41, 70])
    folder = run("back")
    # 24-39, then at the same step 40-55; places 24, 32, ... are then numbers 56, 64, ...: 70 is in the next but one
    assert [(entry["step"], entry["to"], entry["left_out"]) for entry in noted(folder)] == [
        (5, 3, [24, 40]), (4, 3, [40, 48]), (6, 3, [48, 72]),
    ]  # fmt: skip
    monkeypatch.undo()
    never_saw(monkeypatch, (24, 72))
    assert same(folder, run("never"))


@pytest.mark.parametrize("step", [3, 6], ids=["before the next checkpoint", "after it"])
def test_a_run_killed_after_it_went_back_resumes_exactly(run, whole, as_killed, step):
    as_killed(step)  # had it forgotten what it left out, it would train on those windows now
    assert same(run("killed", resume=True), whole)


def test_a_checkpoint_alone_contains_the_excluded_windows(run, whole, as_killed):
    (as_killed(6) / ROLLBACKS).unlink()
    assert same(run("killed", resume=True), whole)


def test_without_a_checkpoint_the_run_begins_anew_past_the_windows(run, monkeypatch):
    spoil(monkeypatch, not_a_number, numbers=[9])
    folder = run("back")
    assert [(entry["to"], entry["left_out"]) for entry in noted(folder)] == [(0, [0, 16])]
    monkeypatch.undo()
    never_saw(monkeypatch, (0, 16))
    assert same(folder, run("never"))


def test_a_corrupt_checkpoint_is_skipped(run, monkeypatch, tmp_path, caplog):
    spoil(monkeypatch, not_a_number, numbers=[60])
    plain, newest = StepGuard._judge_nonfinite, tmp_path / "back/checkpoints/step-00000006/training.pt"

    def judge(self, *arguments):
        newest.write_bytes(b"")
        return plain(self, *arguments)

    monkeypatch.setattr(StepGuard, "_judge_nonfinite", judge)
    with caplog.at_level("WARNING"):
        (entry,) = noted(run("back"))
    assert (entry["step"], entry["to"], entry["left_out"]) == (8, 3, [24, 64])
    assert "skipped step-00000006: training.pt is empty" in caplog.text


def test_a_run_that_goes_back_too_often_stops_with_its_checkpoints(run, monkeypatch, tmp_path):
    spoil(monkeypatch, not_a_number, numbers=range(38, 120))
    with pytest.raises(
        SpikeError, match=r"step 4: loss=nan .* spikes\.max_rollbacks=2: the run has reached this limit"
    ):
        run("back", "spikes.max_rollbacks=2")
    assert len(noted(tmp_path / "back")) == 2
    assert weights(tmp_path / "back").keys()
    assert sorted(losses(tmp_path / "back")) == [1, 2, 3]
    summary = json.loads((tmp_path / "back/summary.json").read_text())
    assert summary["status"].startswith("failed: step 4: loss=nan")


def test_where_single_updates_are_skipped_only_ten_in_a_row_send_the_run_back(run, monkeypatch):
    spoil(monkeypatch, not_a_number, numbers=range(24, 24 + 10 * WINDOWS))
    folder = run("back", "on_nonfinite=skip", "max_steps=16", "checkpoint_every=2", "val_every=16")
    (entry,) = noted(folder)
    assert (entry["step"], entry["to"], entry["left_out"]) == (13, 12, [96, 104])
    assert [row.get("nonfinite_steps") for row in rows(folder)] == [None] * 3 + [*range(1, 10)] + [None] * 4


def test_the_windows_that_were_refused_can_be_replayed_afterwards(whole):
    (line,) = [json.loads(row) for row in (whole / FILE).read_text().splitlines()]
    refused = [window for part in line["micro_batches"] for window in part["windows"]]
    assert [found.window for found in replay(ReplayConfig(run_dir=str(whole), step=5))] == refused
    taken = replay(ReplayConfig(run_dir=str(whole), step=4))  # the checkpoint of step 3 has the very weights
    # bf16 in other shapes
    assert sum(found.loss for found in taken) / len(taken) == pytest.approx(rows(whole)[3]["train/loss"], rel=1e-3)


def test_a_corrupt_list_of_excluded_windows_is_named(run, as_killed):
    (as_killed(6) / ROLLBACKS).write_text("[{")
    with pytest.raises(CheckpointError, match=r"rollbacks\.json: the file is corrupt"):
        run("killed", resume=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("spikes.past=-1", r"spikes\.past=-1: must be at least 0"),
        ("spikes.max_rollbacks=0", r"spikes\.max_rollbacks=0: must be at least 1"),
        ("optimizer=tiger", r"spikes=rollback: optimizer\.accumulate=momentum leaves no gradient"),
    ],
)
def test_settings_that_cannot_act_are_refused(run, override, message):
    more = ("optimizer.accumulate=momentum", "trainer.gradient_clip_val=null") if "tiger" in override else ()
    with pytest.raises(ConfigError, match=message):
        run("refused", override, *more)
