"""The loss of an update is the mean over its labels, however they are spread over micro-batches."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llm.contracts import LossShare
from llm.model.transformer import TransformerOutput
from llm.objective.next_token import NextToken
from llm.ops.noise import KeyedNoise
from llm.training.train import train
from llm.training.update_share import UpdateShares

RECALL = (
    *("data=recall", "data.length=40", "data.num_pairs=2", "data.distance=4", "data.num_documents=200"),
    *("context_length=16", "batch_tokens=64", "max_steps=3", "val_every=3", "checkpoint_every=3"),
    *("trainer.precision=32-true", "callbacks.samples=null", "callbacks.progress=null", "loader.val_tokens=64"),
)
"""Windows of which some have no label at all."""


@pytest.fixture
def run(composed, tiny, tmp_path):
    def make(name, *overrides):
        kept = [t for t in tiny if not t.startswith("data")]
        (tmp_path / name).mkdir()
        train(composed(*kept, *RECALL, *overrides), tmp_path / name)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return lines, load_file(tmp_path / name / "checkpoints/last/model.safetensors")

    return make


@pytest.mark.parametrize("settings", [("optimizer=adamw",), ("optimizer=tiger", "trainer.gradient_clip_val=null")])
def test_accumulation_changes_neither_loss_nor_gradient_nor_weights(run, settings):
    whole = run("whole", *settings, "micro_batch_size=4")
    others = {"buffer": ("micro_batch_size=1",)}
    if "optimizer=tiger" in settings:
        others["momentum"] = ("micro_batch_size=1", "optimizer.accumulate=momentum")
    for name, changes in others.items():
        lines, weights = run(name, *settings, *changes)
        for line, expected in zip(lines, whole[0], strict=True):
            assert line["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
            if "grad_norm" in line:
                assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert max(float((weights[n] - t).abs().max()) for n, t in whole[1].items()) < 2e-5, name


class Measured:
    """A decoder whose hidden states are the losses of the labels."""

    def loss(self, hidden, labels, reduction="mean"):
        losses = hidden[..., 0][labels >= 0]
        return losses.sum() if reduction == "sum" else losses.sum() / max(1, len(losses))


def loss_of(hidden, labels, share):
    """The loss of next tokens for given hidden states."""
    objective, model = NextToken(vocab_size=2, bos_id=0), Measured()
    batch = dict.fromkeys(("input_ids", "labels", "positions", "document_ids"), labels)
    prepared = objective.prepare(model, batch, KeyedNoise(0, 0, torch.arange(len(labels))))
    return objective.loss(model, model.loss, prepared, TransformerOutput(hidden, {}, {}), share)[0]


def test_the_mean_of_the_parts_is_the_loss_per_label_also_without_any_label():
    hidden, labels = torch.randn(4, 8, 1), torch.full((4, 8), -100)
    for row, count in enumerate((4, 4, 8, 0)):
        labels[row, :count] = 1
    parts = [loss_of(h[None], y[None], LossShare(16, 4)) for h, y in zip(hidden, labels, strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), hidden[labels >= 0].mean())
    assert loss_of(hidden, torch.full((4, 8), -100), LossShare(0, 1)) == 0


class Data:
    """A data module that counts how often it is asked."""

    def __init__(self):
        self.asked = []

    def labels_of_step(self, step, *, with_last=True):
        self.asked.append((step, with_last))


class Trainer:
    """The attributes of a trainer that the loss reads."""

    def __init__(self, rank=0, world_size=1, accumulation=2):
        self.global_step, self.accumulate_grad_batches, self.datamodule = 0, accumulation, Data()
        self.world_size, self.global_rank = world_size, rank


def batch_of(windows):
    return {"input_ids": torch.zeros(windows, 7, dtype=torch.long)}


def test_where_every_label_has_a_loss_the_plain_mean_is_taken_and_labels_are_counted_once_per_update():
    shares, trainer = UpdateShares(seed=0, with_last=True), Trainer()
    hidden, labels = torch.randn(1, 7, 1), torch.ones(1, 7, dtype=torch.long)
    for step in (0, 0, 1, 1):
        trainer.global_step = step
        share, _ = shares.of_micro_batch(batch_of(1), trainer=trainer)
        assert loss_of(hidden, labels, share) == Measured().loss(hidden, labels)
    assert trainer.datamodule.asked == [(0, True), (1, True)]


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 4), (2, 2), (4, 1), (1, 1), (2, 1)])
def test_the_noise_of_an_update_does_not_depend_on_ranks_and_micro_batches(ranks, accumulation):
    found = {}
    for rank in range(ranks):
        shares, trainer = UpdateShares(seed=3, with_last=False), Trainer(rank, ranks, accumulation)
        for trainer.global_step in (0, 1):
            for micro_step in range(accumulation):
                windows = 8 // (ranks * accumulation)
                _, noise = shares.of_micro_batch(batch_of(windows), trainer=trainer)
                place = (trainer.global_step, micro_step, rank)
                found[place] = torch.cat([noise.uniform(5, stream=1), noise.levels()], 1)
    whole = torch.cat([found[place] for place in sorted(found)])
    rows = torch.arange(8)
    expected = [KeyedNoise(3, step, rows) for step in (0, 1)]
    assert torch.equal(whole, torch.cat([torch.cat([n.uniform(5, stream=1), n.levels()], 1) for n in expected]))
