"""Runs of two ranks with every default callback: samples, validation and evaluations included."""

import json

import pytest
from distributed_helpers import distance, losses

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
FEW_LABELS = (
    *("data=recall", "data.length=40", "data.num_pairs=2", "data.distance=4", "data.num_documents=200"),
    *(
        "context_length=16",
        "batch_tokens=64",
        "micro_batch_size=1",
        "max_steps=2",
        "val_every=2",
        "loader.val_tokens=64",
    ),
    *("optimizer=adamw", "optimizer.lr=0.01", "trainer.precision=32-true", "callbacks.samples=null"),
)
"""Windows with different numbers of labels, some with none; an update is two micro-batches on each of two ranks."""


@pytest.fixture(scope="module")
def session(runs, ddp):
    """One session of two ranks for all cases, and one process for the numbers of the others."""
    for name, (model, *settings) in CASES.items():
        runs.plan(name, *MODELS[model], *settings, *SHORT)
    runs.plan("labels-ddp", *FEW_LABELS, **ddp)
    runs.plan("labels-2", *FEW_LABELS, "trainer.stage=2")
    runs.launch()
    runs.alone("labels", *FEW_LABELS, "micro_batch_size=4")
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


@pytest.mark.parametrize("strategy", ["ddp", "2"])
def test_ranks_weigh_every_label_of_an_update_alike(session, strategy):
    one, two = session.out / "labels", session.out / f"labels-{strategy}"
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert distance(one, two)[1] < 2e-5
