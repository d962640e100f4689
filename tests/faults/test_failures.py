"""Failures in the middle of a run: the error names the cause, earlier checkpoints are kept, and the run resumes."""

import json
import shutil

import pytest
import torch

from data.data_module import TokenDataModule
from data.tokens import HEADER_BYTES
from data.windows import WindowDataset
from llm.errors import DataError, OutOfMemoryError
from llm.training.module import LanguageModule
from llm.training.train import train

SHORT = ("max_steps=10", "checkpoint_every=3", "val_every=10", "callbacks.samples=null", "trainer.precision=32-true")


@pytest.fixture
def run(composed, tiny, tmp_path):
    def make(name, *overrides, resume=False):
        folder = tmp_path / name
        train({**composed(*tiny, *SHORT, *overrides), "resume": str(folder) if resume else None}, folder)
        return folder

    return make


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows}


def status(folder):
    return json.loads((folder / "summary.json").read_text())["status"]


def test_a_token_outside_the_vocabulary_is_named_with_its_file_and_place(run, tmp_path):
    cache = f"loader.cache_dir={tmp_path}/cache"
    whole = run("whole", cache)
    (shard,) = (tmp_path / "cache").rglob("train*.bin")
    sound = shard.read_bytes()
    shard.write_bytes(sound[:HEADER_BYTES] + b"\xff\x01" * ((len(sound) - HEADER_BYTES) // 2))
    with pytest.raises(DataError, match=rf"{shard.name}: token 511 at byte \d+ is outside the vocabulary of 257"):
        run("broken", cache)
    assert status(tmp_path / "broken").startswith("failed: loader.cache_dir=")
    shutil.rmtree(tmp_path / "cache")
    assert losses(run("again", cache)) == losses(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_while_windows_are_read_ends_the_run_and_costs_nothing_that_was_saved(
    run, monkeypatch, tmp_path, workers
):
    whole, plain, load = run("whole"), WindowDataset.__getitems__, TokenDataModule.train_dataloader
    bad = []

    def read(self, indices):
        if bad and set(indices) & set(bad):
            raise RuntimeError("the disk is gone")
        return plain(self, indices)

    monkeypatch.setattr(WindowDataset, "__getitems__", read)

    def loader(self):
        bad.extend(self.windows_of_step(7))
        return load(self)

    monkeypatch.setattr(TokenDataModule, "train_dataloader", loader)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        run("broken", f"loader.num_workers={workers}")
    assert status(tmp_path / "broken").startswith("failed: ")
    assert (tmp_path / "broken/checkpoints/step-00000006").is_dir()
    assert sorted(losses(tmp_path / "broken")) == list(range(1, 8))
    monkeypatch.undo()
    assert losses(run("broken", f"loader.num_workers={workers}", resume=True)) == losses(whole)


def test_the_error_for_a_device_without_memory_names_settings_with_which_the_run_resumes(run, monkeypatch, tmp_path):
    whole, plain = run("whole"), LanguageModule.training_step

    def step(self, batch, batch_idx):
        if self.global_step == 7 and len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nOf the allocated memory")
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModule, "training_step", step)
    with pytest.raises(OutOfMemoryError) as error:
        run("broken")
    told = str(error.value)
    assert told.startswith("micro_batch_size=4: out of memory at step 8 (CUDA out of memory. Tried to allocate 2")
    assert f"resume={tmp_path}/broken micro_batch_size=2" in told
    assert "model.activation_checkpointing=true" in told
    assert status(tmp_path / "broken").startswith("failed: CUDA out of memory")
    again = run("broken", "micro_batch_size=2", "model.activation_checkpointing=true", resume=True)
    for step_, loss in losses(whole).items():
        assert losses(again)[step_] == pytest.approx(loss, rel=1e-5)  # fp32, summed in another order
