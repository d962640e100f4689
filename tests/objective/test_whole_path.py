"""Each objective trains, resumes, evaluates, generates and reports, with the same losses however it is run."""

import json

import pytest
import torch
from catalogue import options
from safetensors.torch import load_file

from llm.commands.evaluate import evaluate, subject_of
from llm.commands.export import ExportConfig, export
from llm.commands.replay import ReplayConfig, replay
from llm.commands.talk import talk
from llm.config.check import check
from llm.errors import ConfigError
from llm.evals.bound import LikelihoodBound, window_sums
from llm.evals.evaluation import window_noise
from llm.evals.extrapolation import Extrapolation
from llm.evals.held_out_loss import HeldOutLoss
from llm.training.plan import describe_plan
from llm.training.rebuild import rebuild
from llm.training.train import train

NEEDS = {"block": ("objective.block_length=8",)}
NAMES = [name for name in options("objective") if name != "next_token"]
SHORT = ("max_steps=4", "val_every=2", "checkpoint_every=2", "callbacks.samples=null", "trainer.precision=32-true")


@pytest.fixture(scope="module", params=NAMES)
def trained(request, composed, tiny, tmp_path_factory):
    """The name of an objective, its overrides, and the folder of a short run."""
    settings = (*tiny, *SHORT, f"objective={request.param}", *NEEDS.get(request.param, ()))
    folder = tmp_path_factory.mktemp(request.param)
    train(composed(*settings), folder)
    return request.param, settings, folder


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", "train/loss", "val/loss") if key in line} for line in lines]


def weights(folder):
    return load_file(folder / "checkpoints/last/model.safetensors")


def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(trained, composed, tmp_path):
    _, settings, folder = trained
    train(composed(*settings, "max_steps=2", "schedule=constant"), tmp_path / "parts")
    train({**composed(*settings, "schedule=constant"), "resume": str(tmp_path / "parts")}, tmp_path / "parts")
    train(composed(*settings, "schedule=constant"), tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(torch.equal(tensor, weights(tmp_path / "whole")[n]) for n, tensor in weights(tmp_path / "parts").items())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert (summary["bound"], summary["bound_samples"]) == (True, 1)


def test_accumulation_changes_neither_corruption_nor_losses(trained, composed, tmp_path):
    _, settings, folder = trained
    train(composed(*settings, "micro_batch_size=1"), tmp_path)
    for line, expected in zip(losses(tmp_path), losses(folder), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)


def test_every_validation_draws_the_same_corruption(trained):
    _, _, folder = trained
    subject = subject_of(rebuild(folder, "last"))
    found = HeldOutLoss(sources={})(subject).figures
    summary = json.loads((folder / "summary.json").read_text())
    assert found["val/loss"] == pytest.approx(summary["val/loss"], rel=1e-6)
    sums, counts, seen = [], [], 0
    for batch in subject.data.validation_batches():
        own = subject.objective.validation_nll(subject.model, subject.model, batch, window_noise(seen, batch))
        sums.append(own.nats.double().sum(1))
        counts.append(own.scored.double().sum(1))
        seen += len(batch["input_ids"])
    nats, labels = torch.cat(sums), torch.cat(counts)
    deviations = nats - labels * nats.sum() / labels.sum()
    error = (deviations.square().sum() / (len(nats) - 1) * len(nats)).sqrt() / labels.sum()
    assert summary["loss_standard_error"] == pytest.approx(float(error), rel=1e-4)


def test_the_bound_is_marked_and_has_errors_and_more_samples_only_lower_the_spread(trained):
    name, _, folder = trained
    subject = subject_of(rebuild(folder, "last"))
    result = LikelihoodBound(samples=4)(subject)
    figures = result.figures
    assert result.rows[0][2].startswith("<= ")
    assert figures["is_bound"]
    assert figures["samples"] == 4
    assert 0 < figures["monte_carlo_error"] < figures["nats"]
    nats, tokens, _ = window_sums(subject, strata=1)
    assert float(nats.mean(1).sum() / tokens.sum()) == pytest.approx(figures["nats"], rel=1e-9)
    with pytest.raises(ConfigError, match=rf"eval=extrapolation: scores each token .* objective={name} is not trained"):
        Extrapolation(factors=[1], last=4, windows=4)(subject)


def test_its_commands_evaluate_generate_and_replay(trained, judging, tmp_path, capsys):
    _, _, folder = trained
    evaluate(judging(f"run_dir={folder}", "eval=[bound,samples]", "eval.samples.max_new_tokens=4"), tmp_path)
    given = {"run_dir": str(folder), "checkpoint": "last", "average": 1, "prompt": ["a", "bcd"], "max_new_tokens": 6}
    given |= {"temperature": 1.0, "top_k": None, "top_p": 0.9, "repetition_penalty": 1.0, "stop": [], "seed": 0}
    capsys.readouterr()
    talk(given | {"use_cache": True, "stream": False, "steps": 2})
    once = capsys.readouterr().out
    talk(given | {"use_cache": True, "stream": False, "steps": 2})
    assert once == capsys.readouterr().out
    assert once.startswith("a")
    windows = replay(ReplayConfig(run_dir=str(folder), step=4))
    expected = losses(folder)[-1]["train/loss"]
    assert sum(w.loss for w in windows) / len(windows) == pytest.approx(expected, rel=0.3)


def test_an_export_is_refused_with_the_reason(trained, tmp_path, monkeypatch):
    name, _, folder = trained
    given = {"run_dir": str(folder), "checkpoint": "last", "average": 1, "format": "hf", "dtype": "float32"}
    monkeypatch.setattr("llm.commands.export.require_transformers", lambda: None)
    with pytest.raises(ConfigError, match=f"objective={name}: every class of transformers that is written here"):
        export(ExportConfig(**given, out=str(tmp_path / "out"), tokens=64))


def test_the_plan_counts_the_work_of_the_objective(trained, composed):
    name, settings, folder = trained
    plan = describe_plan(check(composed(*settings)))
    flops = json.loads((folder / "summary.json").read_text())["flops_per_token"]
    causal = describe_plan(check(composed(*(s for s in settings if not s.startswith("objective")))))
    assert plan != causal
    run = rebuild(folder, "last")
    assert flops == 3 * run.module.objective.flops_per_token(run.module.model, 32)
    assert flops > 3 * run.module.model.flops_per_token(32), name


def test_a_next_token_run_starts_one_of_another_objective(trained, composed, tiny, tmp_path):
    _, settings, _ = trained
    train(composed(*tiny, *SHORT, "max_steps=2"), tmp_path / "first")
    train(composed(*settings, "max_steps=2", f"init_from={tmp_path / 'first'}"), tmp_path / "second")
    added = {name for name in weights(tmp_path / "second") if name not in weights(tmp_path / "first")}
    assert {name.split(".")[1] for name in added} <= {"extra_embedding", "time_embedding"}
    assert added
