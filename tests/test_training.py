"""Whole runs, small enough for seconds."""

import json

import pytest
import torch
import yaml

from llm.commands.evaluate import evaluate
from llm.errors import CheckpointError, ConfigError, NonFiniteError
from llm.run_folder.checkpoint import load_model
from llm.training.module import LanguageModule
from llm.training.train import train


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"].hex() for row in rows}


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def weights(folder):
    return load_model((folder / "checkpoints/last").resolve())


@pytest.fixture
def run(composed, tiny, tmp_path):
    def make(name, *overrides):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return folder, train(composed(*tiny, *overrides), folder)

    return make


def test_a_run_leaves_what_the_design_says(run):
    folder, loss = run("run")
    for name in ("config.yaml", "summary.json", "metrics.jsonl", "optimizer.txt", "samples.txt", "tokenizer.json"):
        assert (folder / name).stat().st_size > 0, name
    figures = summary(folder)
    assert figures["status"] == "finished"
    assert figures["steps"] == 8
    assert figures["tokens_seen"] == 8 * 256
    assert figures["val/loss"] == loss
    assert (folder / "checkpoints/last").resolve().name == "step-00000008"
    assert sorted(losses(folder)) == list(range(1, 9))


def test_a_model_learns(run):
    folder, loss = run("run", "max_steps=60", "optimizer.lr=1e-2", "val_every=60", "checkpoint_every=60")
    first = float.fromhex(losses(folder)[1])
    assert first == pytest.approx(5.55, abs=0.1)  # ln 257
    assert loss < first - 2


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("micro_batch_size=2", "model.dropout=0.1"),
        ("loader.num_workers=2",),
        ("trainer.precision=32-true", "schedule=wsd", "model/position=none"),
    ],
    ids=["plain", "accumulation and dropout", "two workers", "fp32"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, composed, tiny, settings):
    whole, _ = run("whole", *settings)
    broken, _ = run("broken", *settings, "checkpoint_every=3", "callbacks.checkpoints.keep=9")
    for step in ("6", "8"):  # as if killed after step 3, in the middle of an epoch and of a validation interval
        folder = broken / f"checkpoints/step-0000000{step}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (broken / "checkpoints/last").unlink()
    train({**composed(*tiny, *settings), "resume": str(broken)}, broken)
    assert losses(broken) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(broken).values(), weights(whole).values(), strict=True))


def test_the_same_update_split_into_micro_batches_gives_the_same_losses_to_rounding(run):
    whole, _ = run("whole", "micro_batch_size=8", "trainer.precision=32-true")
    split, _ = run("split", "micro_batch_size=2", "trainer.precision=32-true")
    for step, value in losses(whole).items():
        # fp32 sums in another order; eight updates amplify it
        assert float.fromhex(losses(split)[step]) == pytest.approx(float.fromhex(value), rel=1e-5)


def test_evaluation_gives_the_loss_that_training_gave(run, judging, tmp_path):
    folder, loss = run("run")
    assert evaluate(judging(f"run_dir={folder}", "eval=[loss]"), tmp_path) == pytest.approx(loss, abs=1e-6)


def test_evaluation_names_a_missing_checkpoint(run, judging, tmp_path):
    folder, _ = run("run")
    with pytest.raises(CheckpointError, match=r"checkpoint=step-9: .*choose one of \['best', 'last'"):
        evaluate(judging(f"run_dir={folder}", "eval=[loss]", "checkpoint=step-9"), tmp_path)


def test_a_tokenizer_that_does_not_fit_the_weights_is_refused(run, judging, tmp_path):
    folder, _ = run("run")
    cfg = yaml.safe_load((folder / "config.yaml").read_text())
    cfg["tokenizer"] = {"_target_": "data.tokenizer.BpeTokenizer", "vocab_size": 300, "sample_bytes": 100_000}
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    with pytest.raises(CheckpointError, match=r"tokenizer: has 300 tokens and the weights in .* were trained with 257"):
        evaluate(judging(f"run_dir={folder}", "eval=[loss]"), tmp_path)


def test_weights_of_another_run_can_be_where_a_run_starts(run):
    source, _ = run("source")
    folder, _ = run("next", f"init_from={source}", "max_steps=1", "optimizer.lr=1e-9")
    for name, tensor in weights(source).items():
        torch.testing.assert_close(weights(folder)[name], tensor, atol=1e-6, rtol=0)  # one step of lr 1e-9


def test_weights_of_another_shape_are_refused_with_the_keys_that_differ(run):
    source, _ = run("source")
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.gate_proj\.weight"):
        run("next", f"init_from={source}", "model.ffn.d_ff=64")


def test_a_finished_run_is_reported_and_trains_nothing(run, composed, tiny, caplog):
    folder, loss = run("run")
    before = (folder / "metrics.jsonl").read_text()
    with caplog.at_level("WARNING"):
        assert train({**composed(*tiny), "resume": str(folder)}, folder) == loss
    assert "already complete at step 8; to train longer, raise max_steps" in caplog.text
    assert (folder / "metrics.jsonl").read_text() == before


def test_resuming_a_folder_without_a_checkpoint_is_refused(composed, tiny, tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        train({**composed(*tiny), "resume": str(tmp_path)}, tmp_path)


def test_two_runs_cannot_share_a_folder(run):
    run("run")
    with pytest.raises(ConfigError, match="already has a run"):
        run("run")


def poison(monkeypatch, steps):
    plain = LanguageModule.training_step

    def poisoned(self, batch, batch_idx):
        loss = plain(self, batch, batch_idx)
        return loss * float("nan") if self.global_step in steps else loss

    monkeypatch.setattr(LanguageModule, "training_step", poisoned)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_update(run, monkeypatch, tmp_path):
    poison(monkeypatch, {5})
    with pytest.raises(NonFiniteError, match="at step 6: not finite, and nothing was updated"):
        run("run")
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    assert summary(tmp_path / "run")["status"].startswith("failed: ")


def test_a_skipped_step_changes_no_weight_and_is_counted(run, monkeypatch):
    settings = ("on_nonfinite=skip", "max_steps=6", "val_every=6", "checkpoint_every=5", "schedule=constant")
    poison(monkeypatch, {5})
    folder, _ = run("run", *settings)
    states = [load_model(folder / f"checkpoints/step-0000000{step}") for step in (5, 6)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["nonfinite_steps"] == 1


def test_tiger_shrinks_tensors_with_non_finite_gradients_and_training_continues(run, monkeypatch):
    poison(monkeypatch, {5})
    settings = ("optimizer=tiger", "optimizer.shrink_ratio=0.5", "on_nonfinite=tiger", "schedule=constant")
    folder, _ = run("run", *settings, "max_steps=6", "val_every=6", "checkpoint_every=5")
    before, after = (load_model(folder / f"checkpoints/step-0000000{step}") for step in (5, 6))
    name = "model.layers.0.ffn.up_proj.weight"
    assert torch.equal(after[name], before[name] * 0.5)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["nonfinite_steps"] == 1


def test_accumulating_in_the_momentum_gives_the_losses_of_accumulating_in_the_gradient(run):
    settings = ("optimizer=tiger", "micro_batch_size=2", "trainer.gradient_clip_val=null", "trainer.precision=32-true")
    buffer, _ = run("buffer", *settings)
    momentum, _ = run("momentum", *settings, "optimizer.accumulate=momentum")
    for step, value in losses(buffer).items():
        # the sums are taken in another order; a sign flips where a momentum is within rounding of zero
        assert float.fromhex(losses(momentum)[step]) == pytest.approx(float.fromhex(value), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("on_nonfinite=tiger",), "on_nonfinite=tiger: on_nonfinite=tiger and optimizer.shrink_ratio"),
        (
            ("optimizer=tiger", "optimizer.shrink_ratio=0.9"),
            "on_nonfinite=raise: on_nonfinite=tiger and optimizer.shrink_ratio",
        ),
        (("optimizer=tiger", "optimizer.accumulate=momentum"), "trainer.gradient_clip_val=1.0"),
    ],
)
def test_policies_that_could_not_act_are_refused(run, settings, message):
    with pytest.raises(ConfigError, match=message):
        run("run", *settings)


def test_too_many_skipped_steps_in_a_row_stop_the_run(run, monkeypatch):
    poison(monkeypatch, set(range(1, 20)))
    with pytest.raises(NonFiniteError, match="10th step in a row"):
        run("run", "on_nonfinite=skip", "max_steps=20")


def test_a_run_without_validation_ends_with_a_line_about_it(run, caplog):
    with caplog.at_level("INFO"):
        _, loss = run("blind", "+trainer.limit_val_batches=0")
    assert loss is None
    assert "val/loss     not measured" in caplog.text
