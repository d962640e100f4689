import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llm.callbacks.checkpoint_io import FolderCheckpointIO
from llm.errors import CheckpointError
from llm.run_folder import checkpoint, checkpoint_files
from llm.run_folder.checkpoint import compare_state, find_last, load_model, load_training, plain, save_checkpoint
from llm.run_folder.checkpoint_files import point, remove_checkpoint, step_folder, verify

KILL_WHILE_SAVING = """
import os, random, signal, sys, time, torch
from pathlib import Path
from llm.run_folder.checkpoint import find_last, load_model, load_training, save_checkpoint
from llm.run_folder.checkpoint_files import list_checkpoints, point, remove_checkpoint, step_folder, verify
root = Path(sys.argv[1])
checkpoints = root / "checkpoints"
torch.set_num_threads(1)

def save_until_killed(step):
    while True:
        step += 1
        weights = {f"w{i}": torch.full((500, 500), float(step)) for i in range(4)}
        folder = step_folder(checkpoints, step)
        save_checkpoint(folder, model_state=weights, training_state={"m": weights}, manifest={"step": step})
        point(checkpoints / "last", folder)
        for _, old in list_checkpoints(checkpoints)[:-2]:
            remove_checkpoint(old)

chance, step, advanced = random.Random(0), 1, 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        save_until_killed(step)
    time.sleep(chance.uniform(0.01, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = find_last(root)
    assert found.skipped == [], found
    assert found.step >= step, (found, step)
    advanced += found.step > step
    step = found.step
    if step > 1:
        assert load_model(found.path)["w3"][0, 0] == step
        assert load_training(found.path)["m"]["w0"][499, 499] == step
        assert verify(checkpoints / "last") == []
print(advanced)
"""


def save(root, step, value=1.0):
    folder = step_folder(Path(root) / "checkpoints", step)
    state = {"a.weight": torch.full((3, 5), value), "b.bias": torch.arange(4)}
    save_checkpoint(
        folder, model_state=state, training_state={"global_step": step, "x": [1.5]}, manifest={"step": step}
    )
    return folder


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_loaded_checkpoint_equals_the_saved_state(tmp_path):
    folder = save(tmp_path, 7)
    assert verify(folder) == []
    state = load_model(folder)
    assert torch.equal(state["a.weight"], torch.ones(3, 5))
    assert torch.equal(state["b.bias"], torch.arange(4))
    assert load_training(folder) == {"global_step": 7, "x": [1.5]}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert set(manifest["files"]) == {"model.safetensors", "training.pt"}


def test_tied_weights_are_stored_once_and_loaded_as_one_tensor(tmp_path):
    embedding = torch.randn(100, 8)
    state = {"embedding": embedding, "head": embedding, "row": embedding[3], "transposed": embedding.T}
    folder = step_folder(tmp_path, 1)
    save_checkpoint(folder, model_state=state, training_state={}, manifest={"step": 1})
    loaded = load_model(folder)
    assert loaded["embedding"] is loaded["head"]
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert loaded["row"].data_ptr() != loaded["embedding"][3].data_ptr()


def test_every_dtype_and_shape_is_stored_exactly(tmp_path):
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
    state = {str(kind): torch.randint(0, 2, (3, 1)).to(kind) for kind in kinds}
    state |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4)}
    folder = step_folder(tmp_path, 1)
    save_checkpoint(folder, model_state=state, training_state={}, manifest={"step": 1})
    loaded = load_model(folder)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("name", ["model.safetensors", "training.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "removed", "web page"])
def test_a_corrupt_file_is_found_and_the_advice_is_safe(tmp_path, name, damage):
    folder = save(tmp_path, 1)
    path = folder / name
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(path.read_bytes()[:-9])
        case "flipped":
            flip_a_byte(path)
        case "removed":
            path.unlink()
        case "web page":
            path.write_text("<html>not found</html>")
    load = load_training if name == "training.pt" else load_model
    with pytest.raises(CheckpointError, match="use another checkpoint of that run") as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert name in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_a_foreign_file_is_not_a_checkpoint(tmp_path):
    foreign = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: is not a folder"):
        load_model(foreign)
    with pytest.raises(CheckpointError, match="does not exist"):
        FolderCheckpointIO(manifest={}).load_checkpoint(tmp_path / "nowhere")


class RunsCode:
    def __reduce__(self):
        return os.system, ("echo stolen",)


def test_code_in_a_training_file_is_never_run(tmp_path, capfd):
    folder = save(tmp_path, 1)
    torch.save({"x": RunsCode()}, folder / "training.pt")
    with pytest.raises(CheckpointError, match="is not plain data") as caught:
        load_training(folder, check=False)
    assert "weights_only" not in str(caught.value)
    assert "stolen" not in capfd.readouterr().out


def test_a_manifest_cannot_reach_outside_its_folder(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../../etc/hostname"] = manifest["files"].pop("training.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "cannot be part of a checkpoint" in verify(folder)[0]


def test_weights_with_nan_are_refused_when_loaded(tmp_path):
    folder = step_folder(tmp_path, 1)
    state = {"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")])}
    save_checkpoint(folder, model_state=state, training_state={}, manifest={"step": 1})
    with pytest.raises(CheckpointError, match="bad has values that are not finite"):
        load_model(folder)


def test_the_newest_valid_checkpoint_is_found_and_newer_ones_are_reported_with_the_reason(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    flip_a_byte(step_folder(tmp_path / "checkpoints", 40) / "model.safetensors")
    (step_folder(tmp_path / "checkpoints", 30) / "training.pt").unlink()
    found = find_last(tmp_path)
    assert (found.step, found.path.name) == (20, "step-00000020")
    assert found.skipped == [
        "step-00000040: model.safetensors differs from its sha256",
        "step-00000030: training.pt is missing",
    ]


def test_a_folder_without_a_valid_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        find_last(tmp_path)
    flip_a_byte(save(tmp_path, 5) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"every checkpoint of this run is incomplete or corrupt .*step-00000005"):
        find_last(tmp_path)


def test_weights_of_another_architecture_are_refused_with_names_and_shapes():
    model = {"a": torch.zeros(4, 4), "b": torch.zeros(2), "c": torch.zeros(1)}
    compare_state(model, {name: tensor.clone() for name, tensor in model.items()}, source="x")
    other = {"a": torch.zeros(4, 8), "b": torch.zeros(2), "d": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="3 weights differ") as caught:
        compare_state(model, other, source="run/checkpoints/last")
    message = str(caught.value)
    assert "a: (4, 4), the model has (4, 8)" in message
    assert "c: (1,), not in the model" in message
    assert "d: missing, the model has (3,)" in message
    assert "run/checkpoints/last" in message


def test_numpy_numbers_and_enums_become_plain_data_and_objects_are_refused_by_path():
    state = plain({"a": np.float64(2.5), "b": (signal.SIGTERM, True), "c": [torch.Size([2])]})
    assert type(state["a"]) is float
    assert type(state["b"][0]) is int
    assert state["b"][1] is True
    with pytest.raises(CheckpointError, match=r"training state\.callbacks\.rng\[1\]: ndarray"):
        plain({"callbacks": {"rng": [0, np.zeros(2)]}})


@pytest.mark.parametrize("stage", ["save_file", "torch.save", "_write_manifest", "_swap_in", "rename", "_fsync"])
def test_a_failure_at_any_stage_of_saving_keeps_earlier_checkpoints(tmp_path, monkeypatch, stage):
    save(tmp_path, 1)

    def fail(*args, **kwargs):
        raise RuntimeError("stopped here")

    match stage:
        case "save_file":
            monkeypatch.setattr(checkpoint, "save_file", fail)
        case "torch.save":
            monkeypatch.setattr(torch, "save", fail)
        case "rename":
            monkeypatch.setattr(os, "rename", fail)
        case _:
            monkeypatch.setattr(checkpoint_files, stage, fail)
    with pytest.raises(RuntimeError, match="stopped here"):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert find_last(tmp_path).step == 1


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path):
    save(tmp_path, 3, value=1.0)
    folder = save(tmp_path, 3, value=2.0)
    assert load_model(folder)["a.weight"][0, 0] == 2.0
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_too_little_space_is_reported_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 990, 10))
    with pytest.raises(CheckpointError, match=r"step-00000002: .* bytes needed and 10 free"):
        save(tmp_path, 2)
    assert find_last(tmp_path).step == 1


def test_a_disk_that_fills_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fill(value, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(CheckpointError, match="disk or quota is full"):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_file_size_limit_is_reported_by_its_name_and_not_as_a_full_disk(tmp_path):
    big, small = torch.zeros(100_000), torch.zeros(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, (weights, moments) in enumerate([(big, small), (small, big)]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(CheckpointError, match=r"the file-size limit of this process is reached.*ulimit -f"):
                save_checkpoint(
                    step_folder(tmp_path, step), model_state={"w": weights}, training_state={"m": moments}, manifest={}
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_link_is_valid_at_every_moment_while_it_is_replaced(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, 1).parent
    save(tmp_path, 2)
    point(checkpoints / "last", step_folder(checkpoints, 1))
    real, seen = os.replace, []

    def look(source, target):
        seen.append(os.readlink(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", look)
    point(checkpoints / "last", step_folder(checkpoints, 2))
    assert seen == ["step-00000001"]
    assert os.readlink(checkpoints / "last") == "step-00000002"
    assert verify(checkpoints / "last") == []


def test_a_removed_checkpoint_loses_its_name_first(tmp_path, monkeypatch):
    folder = save(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    remove_checkpoint(folder)
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        find_last(tmp_path)


def test_a_kill_at_a_random_moment_always_leaves_a_valid_checkpoint(tmp_path):
    save(tmp_path, 1)
    result = subprocess.run([sys.executable, "-c", KILL_WHILE_SAVING, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 5, "too few rounds saved a checkpoint, so the test is void"


def test_a_dictionary_from_lightning_is_stored_and_loaded_unchanged(tmp_path):
    weight = torch.randn(4, 3)
    dictionary = {
        "state_dict": {"model.embedding": weight, "model.head": weight, "model._extra_state": {"version": 2}},
        "global_step": 12,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(4, 3), "step": torch.tensor(12.0)}}}],
        "lr_schedulers": [{"last_epoch": 12, "lr_lambdas": [None]}],
        "callbacks": {"x": {"seen": (1, 2)}},
    }
    plugin = FolderCheckpointIO(manifest={"world_size": 1, "config_hash": "abc"})
    folder = step_folder(tmp_path, 12)
    plugin.save_checkpoint(dictionary, folder)
    loaded = plugin.load_checkpoint(folder, weights_only=False)
    assert loaded["state_dict"]["model.embedding"] is loaded["state_dict"]["model.head"]
    assert torch.equal(loaded["state_dict"]["model.head"], weight)
    assert loaded["state_dict"]["model._extra_state"] == {"version": 2}
    assert torch.equal(loaded["optimizer_states"][0]["state"][0]["exp_avg"], torch.ones(4, 3))
    assert loaded["callbacks"] == {"x": {"seen": (1, 2)}}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"], manifest["config_hash"]) == (12, 1, "abc")
    plugin.remove_checkpoint(folder)
    assert not folder.exists()


def test_the_files_of_a_checkpoint_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == dict.fromkeys(
        ["model.safetensors", "training.pt", "manifest.json"], "0o640"
    )
