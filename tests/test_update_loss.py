"""The loss of an update is the mean over its labels, however they are spread over micro-batches."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llm.training.train import train
from llm.training.update_loss import UpdateLoss, share_of_loss

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


def measure(hidden, labels, reduction="mean"):
    """Return the hidden states of the labels as their losses."""
    losses = hidden[..., 0][labels >= 0]
    return losses.sum() if reduction == "sum" else losses.sum() / max(1, len(losses))


def test_the_mean_of_the_parts_is_the_loss_per_label_also_without_any_label():
    hidden, labels = torch.randn(4, 8, 1), torch.full((4, 8), -100)
    for row, count in enumerate((4, 4, 8, 0)):
        labels[row, :count] = 1
    parts = [
        share_of_loss(measure, h[None], y[None], num_labels=16, num_parts=4)
        for h, y in zip(hidden, labels, strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), hidden[labels >= 0].mean())
    assert share_of_loss(measure, hidden, torch.full((4, 8), -100), num_labels=0, num_parts=1) == 0


class Data:
    """A data module that counts how often it is asked."""

    def __init__(self):
        self.asked = []

    def labels_of_step(self, step):
        self.asked.append(step)


class Trainer:
    """The attributes of a trainer that the loss reads."""

    def __init__(self):
        self.global_step, self.accumulate_grad_batches, self.world_size, self.datamodule = 0, 2, 1, Data()


def test_where_every_label_has_a_loss_the_plain_mean_is_taken_and_labels_are_counted_once_per_update():
    loss, trainer = UpdateLoss(), Trainer()
    hidden, labels = torch.randn(1, 7, 1), torch.ones(1, 7, dtype=torch.long)
    for step in (0, 0, 1, 1):
        trainer.global_step = step
        found = loss.of_micro_batch(measure, hidden, labels, trainer=trainer)
        assert found == measure(hidden, labels)
    assert trainer.datamodule.asked == [0, 1]
