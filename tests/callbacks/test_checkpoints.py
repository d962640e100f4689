import json
import os

import pytest

from llm.callbacks import checkpoint_io
from llm.callbacks.checkpoints import Checkpoints
from llm.errors import CheckpointError, ConfigError
from llm.run_folder.checkpoint import find_last, load_model
from llm.run_folder.checkpoint_files import list_checkpoints, verify
from llm.run_folder.folder import RunFolder


def exact(folder):
    """Every recorded loss as the number it is, by step; speeds differ from run to run."""
    kept = ("train/loss", "val/loss", "lr/matrix", "tokens_seen")
    return {line["step"]: {name: line[name] for name in kept if name in line} for line in folder.read_metrics()}


def claimed(path):
    folder = RunFolder(path)
    folder.claim()
    return folder


def resume(train, folder, **options):
    found = find_last(folder.path)
    folder.truncate_metrics(found.step)
    return train(folder, ckpt_path=str(found.path), seed=999, **options)


@pytest.mark.parametrize("stop_at", [5, 8, 10, 11])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, folder, train, stop_at, accumulation):
    """Steps 5 and 10 save by number, 8 and 16 validate, 20 does both; 11 is none of them. Equal, so no tolerance."""
    whole = claimed(tmp_path / "whole")
    train(whole, max_steps=21, accumulation=accumulation)
    train(folder, max_steps=stop_at, accumulation=accumulation)
    resume(train, folder, max_steps=21, accumulation=accumulation)
    expected, got = exact(whole), exact(folder)
    extra_validation = {stop_at} - {4, 8, 12, 16, 20, 21}
    for step in extra_validation:  # the first run ended there, so it validated there
        got[step].pop("val/loss")
    assert got == expected
    last, other = load_model(find_last(folder.path).path), load_model(find_last(whole.path).path)
    assert all((last[name] == other[name]).all() for name in last)


def test_a_run_resumed_three_times_equals_an_uninterrupted_one(tmp_path, folder, train):
    whole = claimed(tmp_path / "whole")
    train(whole, max_steps=16)
    train(folder, max_steps=4)
    for max_steps in (8, 12, 16):
        resume(train, folder, max_steps=max_steps)
    assert exact(folder) == exact(whole)


def test_how_often_a_run_validates_does_not_change_what_it_trains(tmp_path, folder, train):
    often = claimed(tmp_path / "often")
    train(folder, max_steps=9, val_every=1000)
    train(often, max_steps=9, val_every=1)
    losses = [line["train/loss"] for line in folder.read_metrics()]
    assert losses == [line["train/loss"] for line in often.read_metrics()]


def test_the_last_update_is_always_saved(folder, train):
    train(folder, max_steps=7, checkpoint_every=5)
    assert find_last(folder.path).step == 7
    assert os.readlink(folder.checkpoints / "last") == "step-00000007"


def test_the_newest_two_and_the_best_are_kept(folder, train, tiny_module):
    losses = [3.0, 1.0, float("nan"), 2.5, 2.6, 2.7]
    train(folder, max_steps=12, val_every=2, checkpoint_every=3, module=tiny_module(val_losses=losses))
    assert [step for step, _ in list_checkpoints(folder.checkpoints)] == [4, 9, 12]
    assert os.readlink(folder.checkpoints / "best") == "step-00000004"
    assert os.readlink(folder.checkpoints / "last") == "step-00000012"
    summary = folder.read_summary()
    assert (summary["best_step"], summary["best_val_loss"]) == (4, 1.0)
    assert all(verify(path) == [] for _, path in list_checkpoints(folder.checkpoints))


def test_a_resumed_run_remembers_its_best(folder, train):
    train(folder, max_steps=8)
    folder.update({"best_val_loss": -1.0, "best_step": 8})
    before = os.readlink(folder.checkpoints / "best")
    resume(train, folder, max_steps=16)
    assert os.readlink(folder.checkpoints / "best") == before
    assert folder.read_summary()["best_val_loss"] == -1.0


def test_the_manifest_names_step_and_files(folder, train):
    train(folder, max_steps=3)
    manifest = json.loads((folder.checkpoints / "last" / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert manifest["world_size"] == 1
    assert manifest["tied"] == {"tied.weight": "inner.weight"}


@pytest.mark.parametrize(("setting", "values"), [("checkpoint_every", (0, 2)), ("keep", (1, 1))])
def test_settings_that_would_lose_work_are_refused(folder, setting, values):
    with pytest.raises(ConfigError, match=setting):
        Checkpoints(run_folder=folder, checkpoint_every=values[0], keep=values[1])


def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_leaves_the_one_before(folder, train, monkeypatch):
    real = checkpoint_io.write_contents

    def write(path, contents, *, manifest):
        if manifest["step"] == 10:
            raise CheckpointError("the disk is full")
        real(path, contents, manifest=manifest)

    monkeypatch.setattr(checkpoint_io, "write_contents", write)
    with pytest.raises(CheckpointError, match="the disk is full"):
        train(folder, max_steps=30)
    assert os.readlink(folder.checkpoints / "last") == "step-00000008"  # the best validation
    assert find_last(folder.path).step == 8
    assert folder.read_summary()["status"].startswith("failed: the disk is full")
