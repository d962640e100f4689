import csv

import lightning as L
import numpy as np
import pytest
import torch

from llm.callbacks.file_loggers import csv_logger, tensorboard_logger
from llm.callbacks.recorder import Recorder
from llm.errors import ConfigError


class Contributes(L.Callback):
    def step_metrics(self, trainer, pl_module):
        return {"expert_load": torch.tensor([0.25, 0.75]), "max_violation": torch.tensor(0.5)}


def test_each_update_has_one_line_with_training_validation_and_what_callbacks_add(folder, train):
    train(folder, max_steps=8, val_every=4, extra=[Contributes()])
    lines = folder.read_metrics()
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["tokens_seen"] for line in lines] == [32 * step for step in range(1, 9)]
    assert all({"train/loss", "lr/matrix", "expert_load", "max_violation"} <= set(line) for line in lines)
    assert [line["step"] for line in lines if "val/loss" in line] == [4, 8]
    assert lines[0]["expert_load"] == [0.25, 0.75]
    # LambdaLR with 1 / (1 + step): the first update runs at the full rate
    assert [line["lr/matrix"] for line in lines[:3]] == pytest.approx([0.01, 0.005, 0.01 / 3])


def test_lines_come_every_so_many_updates_and_at_the_first_the_last_and_each_validation(folder, train):
    train(folder, max_steps=11, val_every=3, log_every=4)
    assert [line["step"] for line in folder.read_metrics()] == [1, 3, 4, 6, 8, 9, 11]


def test_the_line_of_a_checkpointed_update_is_in_the_file_before_the_checkpoint(folder, train):
    seen = []

    class Look(L.Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            seen.append((trainer.global_step, folder.read_metrics()[-1]["step"]))

    train(folder, max_steps=10, checkpoint_every=3, val_every=4, extra=[Look()])
    assert seen
    assert all(step == line for step, line in seen)


def test_metrics_stay_tensors_until_the_next_update(folder, train, monkeypatch):
    """Reading a tensor at once would make a GPU finish its queue; a line is written one update late instead."""
    written = []
    original = folder.append_metrics
    monkeypatch.setattr(folder, "append_metrics", lambda step, m: (written.append(step), original(step, m))[1])
    behind = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            behind.append(trainer.global_step - (written[-1] if written else 0))

    train(folder, max_steps=6, val_every=100, checkpoint_every=100, accumulation=1, extra=[Look()])
    assert behind == [1] * 6


def test_a_failure_keeps_the_line_of_the_last_update_that_went_well(folder, train):
    class Fail(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        train(folder, max_steps=8, extra=[Fail()])
    assert [line["step"] for line in folder.read_metrics()] == [1, 2, 3]
    assert folder.read_summary()["status"] == "failed: broken"


def test_loggers_get_the_same_numbers_and_a_resumed_run_a_file_of_its_own(folder, train):
    train(folder, max_steps=4, logger=csv_logger(run_folder=folder, flush_every=1))
    train(folder, max_steps=4, logger=csv_logger(run_folder=folder, flush_every=1))
    assert sorted(path.name for path in (folder.path / "csv").iterdir()) == ["version_0", "version_1"]
    rows = csv.DictReader((folder.path / "csv" / "version_0" / "metrics.csv").read_text().splitlines())
    losses = {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}
    assert losses == {line["step"]: line["train/loss"] for line in folder.read_metrics()}


def test_tensorboard_gets_the_same_numbers_under_the_same_names(folder, train):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(folder, max_steps=2, val_every=2, logger=tensorboard_logger(run_folder=folder))
    written = events.EventAccumulator(str(folder.path / "tensorboard"), purge_orphaned_data=False).Reload()
    lines = folder.read_metrics()
    names = {name for line in lines for name in line} - {"step"}
    assert "val/loss" in names
    assert set(written.Tags()["scalars"]) - {"epoch"} == names  # the stand-in for a module logs by itself as well
    for name in names:
        told = {(event.step, event.value) for event in written.Scalars(name)}
        own = {(line["step"], float(np.float32(line[name]))) for line in lines if name in line}
        assert own <= told


def test_settings_out_of_range_are_refused(folder):
    with pytest.raises(ConfigError, match="log_every=0"):
        Recorder(run_folder=folder, log_every=0)
    with pytest.raises(ConfigError, match="flush_every=0"):
        csv_logger(run_folder=folder, flush_every=0)
