"""Every option of every group trains from the command line's configuration, and every optimizer with every model."""

import json

import pytest
from catalogue import options

from llm.training.train import train

NEEDS = {
    "data=hf": None,  # a hub or a folder of files: tests/data
    "data=recall": ("data.num_documents=200", "data.num_pairs=2", "data.distance=4"),
    "data=text": None,  # every other run here reads it
    "tokenizer=bpe": ("tokenizer.vocab_size=300",),
    "tokenizer=pretrained": None,  # a file made elsewhere: tests/data
    "trainer=gpu": None,  # a GPU
    "trainer=ddp": None,  # several processes
    "trainer=deepspeed": None,  # tests/distributed
    "logger=wandb": None,  # tests/test_commands.py
    "model/size=124m": None,  # built without storage in tests/test_transformer.py
    "model/size=350m": None,
    "model/size=1b": None,
    "model/size=7b": None,
    "rates=amos": ("optimizer.weight_decay=0",),
    "scaling=adam_eps": ("scaling.base_batch_tokens=128",),  # a small batch for the probe
    "scaling=sign": ("scaling.base_batch_tokens=128",),
    "scaling=variance": ("scaling.base_batch_tokens=128",),
    "model/position=inv_leaky": ("model.position.train_length=32",),
    "model/attention=vq": ("model/position=none",),
}
"""Settings that an option needs here, or None if other tests cover it."""
GROUPS = ("optimizer", "schedule", "scaling", "batch_schedule", "rates", "data", "tokenizer", "trainer", "logger",
          "model", "model/attention", "model/position", "model/ffn", "model/norm", "model/size")  # fmt: skip
CHOICES = [f"{group}={name}" for group in GROUPS for name in options(group)]
PAIRS = [(f"optimizer={o}", f"model={m}") for o in options("optimizer") for m in options("model")]


def trains(composed, tiny, tmp_path, *overrides):
    short = ("max_steps=2", "val_every=2", "checkpoint_every=2", "callbacks.samples=null", "logger=csv")
    kept = [t for t in tiny if t.split("=")[0] not in {o.split("=")[0] for o in overrides}]
    if any(o.startswith("data=") for o in overrides):
        kept = [t for t in kept if not t.startswith("data.")]
    train(composed(*kept, *short, *overrides), tmp_path)
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert figures["status"] == "finished"
    assert figures["val/loss"] < 12


@pytest.mark.parametrize("choice", [c for c in CHOICES if NEEDS.get(c, ()) is not None])
def test_every_option_trains(composed, tiny, tmp_path, choice):
    trains(composed, tiny, tmp_path, choice, *(NEEDS.get(choice) or ()))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_optimizer_trains_every_model(composed, tiny, tmp_path, pair):
    trains(composed, tiny, tmp_path, *pair)
