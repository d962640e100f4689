"""Codebooks through whole runs: resumed, recomputed, and after a trial of batch sizes."""

import json

import pytest
import torch

from llm.run_folder.checkpoint import load_model
from llm.training.train import train

VQ = (
    "model/attention=vq",
    "model/position=rerope",
    "model.position.window=4",
    "model.attention.block_size=4",
    "model.attention.codebook.codebook_size=8",
    "model.attention.codebook.revive_every=2",
)


@pytest.fixture
def run(composed, tiny, tmp_path):
    def make(name, *overrides):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        train(composed(*tiny, *VQ, *overrides), folder)
        return folder

    return make


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"].hex() for row in rows}


def weights(folder):
    return load_model((folder / "checkpoints/last").resolve())


def assert_same(a, b):
    assert losses(a) == losses(b)
    assert all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


@pytest.mark.parametrize("estimator", ["ema", "rotation", "simvq"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, composed, tiny, estimator):
    settings = (f"model.attention.codebook.estimator={estimator}", "micro_batch_size=2")
    whole = run("whole", *settings)
    broken = run("broken", *settings, "checkpoint_every=3", "callbacks.checkpoints.keep=9")
    for step in ("6", "8"):
        folder = broken / f"checkpoints/step-0000000{step}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (broken / "checkpoints/last").unlink()
    train({**composed(*tiny, *VQ, *settings), "resume": str(broken)}, broken)
    assert_same(broken, whole)


def test_a_recomputed_forward_counts_once(run):
    settings = ("micro_batch_size=2", "model.dropout=0.1")
    assert_same(run("plain", *settings), run("again", *settings, "model.activation_checkpointing=true"))


def test_the_trial_of_batch_sizes_does_not_change_the_codebook(run):
    auto = run("auto", "micro_batch_size=auto")
    size = json.loads((auto / "summary.json").read_text()).get("micro_batch_size")
    chosen = size or next(
        line.split(":")[1] for line in (auto / "config.yaml").read_text().splitlines() if "micro_batch_size" in line
    )
    assert_same(auto, run("given", f"micro_batch_size={int(chosen)}"))


def test_usage_is_logged_by_layer_and_statistics_are_not(run):
    rows = [json.loads(line) for line in (run("run") / "metrics.jsonl").read_text().splitlines()]
    logged = {key for row in rows for key in row}
    for layer in range(2):
        for name in ("codebook_usage", "codebook_perplexity", "quantization_error", "commitment_loss"):
            assert f"train/layer{layer}/{name}" in logged
    assert not any("stat/" in key for key in logged)
