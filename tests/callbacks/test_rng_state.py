import random
from pathlib import Path

import numpy as np
import pytest
import torch

from llm.callbacks.rng_state import RngState, get_rng_state, set_rng_state
from llm.run_folder.checkpoint import load_training, save_checkpoint


def draw():
    generators = (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn())
    return (*generators, torch.rand(3).tolist(), torch.nn.functional.dropout(torch.ones(64), 0.5).tolist())


def test_every_generator_continues_from_its_state_also_through_a_checkpoint_file(tmp_path):
    random.gauss(0, 1), np.random.randn()  # both keep a second Gaussian back
    folder = tmp_path / "step-00000001"
    save_checkpoint(folder, model_state={}, training_state={"rng": get_rng_state()}, manifest={})
    expected = draw()
    draw()
    set_rng_state(load_training(folder)["rng"])
    assert draw() == expected


def test_a_rank_that_the_checkpoint_does_not_know_keeps_its_own_state(caplog):
    torch.manual_seed(5)
    callback = RngState()
    before = torch.get_rng_state()
    callback.load_state_dict({"ranks": []})
    callback.on_train_batch_start()
    assert torch.equal(torch.get_rng_state(), before)
    assert "0 ranks" in caplog.text


def test_what_is_drawn_between_the_start_and_the_first_batch_leaves_no_trace():
    callback = RngState()
    expected = draw()
    callback.on_train_batch_start()
    assert draw() == expected
    callback.on_train_batch_start()
    assert draw() != expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_generator_of_the_gpu_continues_from_its_state():
    torch.rand(1, device="cuda")
    state = get_rng_state()
    expected = torch.rand(8, device="cuda")
    torch.rand(8, device="cuda")
    set_rng_state(state)
    assert torch.equal(torch.rand(8, device="cuda"), expected)


def test_the_state_of_a_gpu_is_saved_and_restored_with_the_others(monkeypatch):
    restored = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    set_rng_state(get_rng_state())
    assert restored == [torch.tensor([7])]


def test_no_other_code_saves_the_random_state_of_the_cpu_alone():
    package = Path(__file__).parents[2] / "llm"
    users = {path.name for path in package.rglob("*.py") if "torch.get_rng_state(" in path.read_text()}
    assert users == {"rng_state.py"}
