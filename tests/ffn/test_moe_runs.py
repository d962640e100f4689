"""Whole runs with experts: balancing does not depend on how an update is divided into micro-batches."""

import json

import pytest
import torch

from llm.run_folder.checkpoint import load_model
from llm.training.train import train

MOE = ("model=moe", "model.ffn.num_experts=4")


@pytest.fixture
def run(composed, tiny, tmp_path):
    def make(name, *overrides):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        train(composed(*tiny, *MOE, *overrides), folder)
        return folder

    return make


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder):
    return load_model((folder / "checkpoints/last").resolve())


def loads(folder):
    return [line["train/layer0/expert_load_global"] for line in lines(folder)]


def test_counts_are_exact_under_accumulation(run):
    whole, cut = run("whole", "micro_batch_size=4"), run("cut", "micro_batch_size=1")
    # the first update routes with the same weights: its counts are the same tokens, its biases the same moves
    assert loads(whole)[0] == loads(cut)[0]
    assert lines(whole)[0]["train/layer0/max_violation"] != lines(cut)[0]["train/layer0/max_violation"]
    biases = [value for name, value in state(cut).items() if name.endswith("balance.bias")]
    assert biases
    assert all(bias.dtype == torch.float32 and bias.abs().sum() > 0 for bias in biases)


def test_activation_checkpointing_changes_nothing(run):
    plain, recomputed = run("plain"), run("recomputed", "model.activation_checkpointing=true")
    assert loads(plain) == loads(recomputed)
    expected, found = state(plain), state(recomputed)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("balance", ["loss_free", "quantile"])
def test_a_resumed_run_equals_an_uninterrupted_one(run, balance):
    chosen = (f"model/ffn/balance={balance}", "schedule=constant", "schedule.warmup=0", "checkpoint_every=4")
    straight = run("straight", *chosen, "max_steps=8")
    part = run("part", *chosen, "max_steps=4")
    resumed = run("part", *chosen, "max_steps=8", f"resume={part}")
    expected, found = state(straight), state(resumed)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert loads(resumed) == loads(straight)


def test_a_run_shows_how_its_experts_are_used(run):
    folder = run("run")
    assert (folder / "expert_load.png").stat().st_size > 1000
    for line in lines(folder):
        load = line["train/layer1/expert_load_global"]
        assert sum(load) == pytest.approx(1)
        assert line["train/layer1/max_violation_global"] == pytest.approx(max(load) * 4 - 1, abs=1e-6)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["active_parameters"] < summary["parameters"]


def test_first_ffn_layers_are_dense(run):
    folder = run("run", "model.first_ffn_layers=1")
    names = state(folder)
    assert any(name.startswith("model.layers.0.ffn.gate_proj") for name in names)
    assert not any(name.startswith("model.layers.0.ffn.experts") for name in names)
    assert any(name.startswith("model.layers.1.ffn.experts") for name in names)
    assert "train/layer0/expert_load_global" not in lines(folder)[0]
