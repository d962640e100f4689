import pickle
import threading

import pytest
import torch

from llm.callbacks.checkpoint_io import FolderCheckpointIO
from llm.errors import CheckpointError
from llm.run_folder import checkpoint as checkpoint_module
from llm.run_folder.background import BackgroundWriter
from llm.run_folder.checkpoint import find_last, load_model
from llm.run_folder.checkpoint_files import step_folder


def test_tasks_run_in_order_and_wait_returns_after_the_last():
    done, writer = [], BackgroundWriter()
    for n in range(20):
        writer.submit(lambda n=n: done.append(n))
    writer.wait()
    assert done == list(range(20))
    pickle.loads(pickle.dumps(writer)).wait()


def test_a_failure_is_raised_once_and_later_tasks_never_run():
    done, writer, go = [], BackgroundWriter(), threading.Event()

    def fail():
        go.wait()
        raise OSError("disk")

    writer.submit(fail)
    writer.submit(lambda: done.append(1))
    writer.check()  # not failed yet
    go.set()
    with pytest.raises(OSError, match="disk"):
        writer.wait()
    assert done == []
    writer.submit(lambda: done.append(2))
    writer.wait()
    assert done == [2]


def test_wait_returns_at_once_after_abandon():
    writer, go = BackgroundWriter(), threading.Event()
    writer.submit(go.wait)
    writer.abandon()
    writer.wait()  # would hang otherwise
    assert not go.is_set()
    go.set()


def checkpoint(step, value):
    return {"state_dict": {"w": value}, "global_step": step, "optimizer_states": [{"m": value, "step": 3}]}


def test_a_checkpoint_has_the_state_at_the_time_of_saving(tmp_path, monkeypatch):
    checkpoint_io, weights, real = FolderCheckpointIO(manifest={}), torch.ones(3), checkpoint_module.write_contents
    gate = threading.Event()
    monkeypatch.setattr(checkpoint_module, "write_contents", lambda *a, **k: (gate.wait(), real(*a, **k)))
    folder = step_folder(tmp_path / "checkpoints", 1)
    checkpoint_io.save_checkpoint(checkpoint(1, weights), folder)
    assert not folder.exists()
    weights.fill_(7)
    gate.set()
    checkpoint_io.teardown()
    assert load_model(folder)["w"].tolist() == [1, 1, 1]
    assert checkpoint_io.load_checkpoint(folder)["optimizer_states"][0]["m"].tolist() == [1, 1, 1]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    checkpoint_io, checkpoints = FolderCheckpointIO(manifest={}), tmp_path / "checkpoints"
    checkpoint_io.save_checkpoint(checkpoint(1, torch.ones(3)), step_folder(checkpoints, 1))
    checkpoint_io.save_checkpoint(checkpoint(2, torch.tensor([1.0, float("nan")])), step_folder(checkpoints, 2))
    with pytest.raises(CheckpointError, match="step-00000002: w has values that are not finite"):
        checkpoint_io.teardown()
    assert find_last(tmp_path).step == 1
    assert len(list(checkpoints.iterdir())) == 1
