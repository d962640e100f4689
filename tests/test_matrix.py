"""Every option of every group trains from the command line's configuration, and every optimizer with every model."""

import json

import pytest
import torch
from catalogue import options

from llm.config.build import build_model, module_factories
from llm.config.sizes import batch_ramp
from llm.training.learning_rate import rated_groups
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
          "model", "model/attention", "model/position", "model/ffn", "model/norm", "model/size",
          "objective")  # fmt: skip
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


PIECES = [
    *(f"model/position={name}" for name in options("model/position") if name != "inv_leaky"),
    *(f"model/attention={name}" for name in options("model/attention") if name != "vq"),
    *(f"model/attention=vq model/position=none model.attention.codebook.estimator={name}"
      for name in ("ema", "straight_through", "rotation", "simvq")),
    "model/attention=vq model/position=none model.attention.codebook.estimator=diveq "
    "model.attention.codebook.commitment_weight=0",
    *(f"model/norm={name}" for name in options("model/norm")),
    *(f"model/ffn={name}" for name in options("model/ffn")),
    *(f"model=moe model/ffn/router={name}" for name in options("model/ffn/router") if name != "threshold"),
    "model=moe model/ffn/router=threshold model/ffn/balance=budget",
    *(f"model=moe model/ffn/balance={name}" for name in options("model/ffn/balance") if name != "budget"),
    "model.tie_embeddings=false",
]  # fmt: skip


@pytest.mark.parametrize("optimizer", options("optimizer"))
def test_every_optimizer_updates_every_parameter_of_every_piece(composed, tiny, optimizer):
    rule = composed(*tiny, f"optimizer={optimizer}")["optimizer"]
    ids = torch.randint(60, (4, 32), generator=torch.Generator().manual_seed(0))
    places = {"positions": torch.arange(32).expand(4, -1), "document_ids": torch.zeros_like(ids)}
    for choice in PIECES:
        torch.manual_seed(0)
        cfg = composed(*tiny, *choice.split()) | {"optimizer": rule}
        model, factories = build_model(cfg, vocab_size=64), module_factories(cfg, batch_ramp(cfg))
        rating = {key: factories[key] for key in ("rates", "optimizer", "lr", "weight_decay")}
        stepper = factories["optimizer"](rated_groups(model, **rating))
        before, moved = {name: p.detach().clone() for name, p in model.named_parameters()}, set()
        for _ in range(2):
            out = model(ids, **places)
            (model.loss(out.hidden, ids.roll(-1, 1)) + sum(out.losses.values())).backward()
            reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
            stepper.step()
            stepper.zero_grad()
            moved |= {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        for name, parameter in model.named_parameters():
            assert torch.isfinite(parameter).all(), (choice, name)
            assert name not in reached or name in moved, (choice, name)  # two signed steps may return a bias to 0
