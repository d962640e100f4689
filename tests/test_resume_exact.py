"""A resumed run equals an uninterrupted one bit for bit, for any combination of pieces."""

import functools
import json
import shutil

import jaxtyping
import pytest
import torch
from catalogue import options
from covering import every_combination, every_pair, name_of, pairs_of

from llm.run_folder.checkpoint import load_model, load_training
from llm.training.module import LanguageModule
from llm.training.train import train

SETTINGS = {
    "optimizer": {name: (f"optimizer={name}",) for name in options("optimizer")},
    "model": {
        "dense": (),
        "moe": ("model=moe", "model.ffn.num_experts=4"),
        "vq": ("model/attention=vq", "model/position=none"),
    },
    "dropout": {"plain": (), "dropout": ("model.dropout=0.1",)},
    "accumulation": {"whole": ("micro_batch_size=8",), "parts": ("micro_batch_size=2",)},
    "workers": {"alone": (), "workers": ("loader.num_workers=2",)},
    "batch": {
        "steady": (),
        "ramp": ("batch_schedule=doubling", "batch_schedule.start_share=0.5", "batch_schedule.every_tokens=384"),
    },
}
"""What a run may consist of: names, and the overrides that they stand for."""

CHOICES = {setting: list(values) for setting, values in SETTINGS.items()}
PAIRS, PRODUCT = every_pair(CHOICES), every_combination(CHOICES)
SHORT = ("max_steps=8", "val_every=4", "checkpoint_every=1", "callbacks.checkpoints.keep=9", "callbacks.samples=null",
         "spikes=skip", "spikes.window=3")  # fmt: skip


@pytest.fixture
def run(composed, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("llm.training.module_and_trainer.peak_flops", lambda *_, **__: 1e9)  # a slow measurement
    replaced = {o.split("=")[0] for o in [*SHORT, "micro_batch_size=2"]}
    base = [*(o for o in tiny if o.split("=")[0] not in replaced), *SHORT]

    def make(row, *overrides, resume=None):
        folder = resume or tmp_path / "whole"
        chosen = [override for setting, value in row.items() for override in SETTINGS[setting][value]]
        train({**composed(*base, *chosen, *overrides), "resume": resume and str(resume)}, folder)
        return folder

    return make


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"].hex(), row["grad_norm"].hex()) for row in rows]


def cut_after(folder, step, name):
    """Copy a run as it would stand, had it been killed after an update."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy, symlinks=True)
    for later in (copy / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    for link in ("last", "best"):
        (copy / "checkpoints" / link).unlink(missing_ok=True)
    return copy


def same_state(one, other):
    """Whether two runs ended with the same weights and buffers, and the same state of the optimizer."""
    a, b = (load_model((folder / "checkpoints/last").resolve()) for folder in (one, other))
    x, y = (load_training((folder / "checkpoints/last").resolve())["optimizer_states"] for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) and equal(x, y)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def goes_on_exactly(run, row, *overrides, stops):
    whole = run(row, *overrides)
    folder = whole
    for stop in stops:
        folder = run(row, *overrides, resume=cut_after(folder, stop, f"from-{stop}"))
        assert losses(folder) == losses(whole), f"resumed after {stop}"
    assert same_state(folder, whole)


def test_the_combinations_have_every_pair():
    wanted = {pair for row in every_combination(CHOICES) for pair in pairs_of(row)}
    assert set().union(*map(pairs_of, PAIRS)) == wanted
    assert len(PAIRS) < 20


@pytest.mark.parametrize("row", PAIRS, ids=name_of)
def test_a_run_resumed_before_a_validation_equals_an_uninterrupted_one(run, row):
    goes_on_exactly(run, row, stops=(3,))


def test_a_run_resumed_three_times_in_one_epoch_equals_an_uninterrupted_one(run):
    goes_on_exactly(run, {"optimizer": "muon", "model": "moe", "dropout": "dropout"}, stops=(1, 4, 6))


@pytest.mark.slow
@pytest.mark.parametrize("row", PRODUCT, ids=name_of)
def test_every_combination_resumed_equals_an_uninterrupted_one(run, row):
    goes_on_exactly(run, row, stops=(3,))


@pytest.fixture
def plain_signatures():
    """Leave shapes unchecked: torch.compile does not trace through the check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


COMPILED = {"optimizer": "muon", "dropout": "dropout", "accumulation": "parts"}


@pytest.mark.parametrize("model", ["moe", "vq"])
def test_a_run_of_a_traced_model_resumed_equals_an_uninterrupted_one(run, plain_signatures, monkeypatch, model):
    """torch.compile traces and splits the graph as it does; that it generates no code saves a minute."""
    plain = LanguageModule.compile_model
    monkeypatch.setattr(LanguageModule, "compile_model", functools.partialmethod(plain, backend="aot_eager"))
    goes_on_exactly(run, COMPILED | {"model": model}, "compile=true", stops=(3,))


@pytest.mark.slow
@pytest.mark.parametrize("model", CHOICES["model"])
def test_a_run_of_a_compiled_model_resumed_equals_an_uninterrupted_one(run, plain_signatures, model):
    goes_on_exactly(run, COMPILED | {"model": model}, "compile=true", stops=(3,))
