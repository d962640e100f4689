"""TensorBoard shows each step once, also after a kill."""

import json
import shutil
from collections import Counter

import pytest

from llm.training.train import train

events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_after_a_kill_each_step_is_shown_once(composed, tiny, tmp_path):
    settings = ("logger=tensorboard", "max_steps=4", "val_every=2", "checkpoint_every=2", "callbacks.samples=null")
    train(composed(*tiny, *settings), tmp_path)
    checkpoints = tmp_path / "checkpoints"
    shutil.rmtree(checkpoints / "step-00000004")  # as if the run had been killed before this checkpoint
    for link in ("last", "best"):
        (checkpoints / link).unlink(missing_ok=True)
    (checkpoints / "last").symlink_to("step-00000002")
    train({**composed(*tiny, *settings), "resume": str(tmp_path)}, tmp_path)
    written = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/loss", "val/loss", "grad_norm"):
        steps = Counter(event.step for event in written.Scalars(name))
        assert steps == Counter(line["step"] for line in lines if name in line), name
