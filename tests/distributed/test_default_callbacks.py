"""Runs of two ranks with every default callback: samples, validation and evaluations included."""

import json

import pytest
from distributed_helpers import losses

MODELS = {
    "dense": (),
    "moe": ("model=moe", "model.ffn.num_experts=4"),
    "vq": ("model/attention=vq", "model/position=none"),
    "hybrid": ("model=hybrid", "model/position=none", "model.attention.pattern=[linear,vq]"),
}
CASES = {
    "hybrid-0": ("hybrid", "trainer.stage=0", "model.tie_embeddings=false"),
    "vq-1": ("vq", "trainer.stage=1", "model.tie_embeddings=true"),
    "moe-2": ("moe", "trainer.stage=2", "model.tie_embeddings=false"),
    "dense-3": ("dense", "trainer.stage=3", "model.tie_embeddings=true"),
}
SHORT = ("max_steps=1", "val_every=1", "eval=[loss]", "trainer.persistence_threshold=0", "trainer.precision=32-true")


@pytest.fixture(scope="module")
def session(runs):
    """One session of two ranks for all cases, and one process for the numbers of the tied model."""
    for name, (model, *settings) in CASES.items():
        runs.plan(name, *MODELS[model], *settings, *SHORT)
    runs.launch()
    runs.alone("dense", "model.tie_embeddings=true", *(s for s in SHORT if "persistence" not in s))
    return runs


@pytest.mark.parametrize("name", CASES)
def test_every_stage_trains_validates_and_samples_with_the_default_callbacks(session, name):
    folder = session.out / name
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    assert "--- step 1 ---" in (folder / "samples.txt").read_text()
    (line,) = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert line["eval/loss/loss"] == pytest.approx(line["val/loss"], abs=1e-4)


def test_a_tied_model_in_parts_writes_the_samples_of_one_process(session):
    one, two = session.out / "dense", session.out / "dense-3"
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert (two / "samples.txt").read_text() == (one / "samples.txt").read_text()
