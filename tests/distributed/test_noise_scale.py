"""The noise scale of two ranks equals that of one process on the same micro-batches."""

import json

import pytest
import torch

from llm.config.files import load

pytestmark = pytest.mark.slow

MEASURE = ("callbacks=noise_scale", "trainer.precision=32-true", "max_steps=6", "optimizer.lr=1e-3")
MUON = ("optimizer=muon", "optimizer.matmul_dtype=float32")
CASES = {
    "zero-0": ("four", "trainer.stage=0"),
    "zero-1": ("four", "trainer.stage=1"),
    "zero-2": ("four", "trainer.stage=2"),
    "zero-2-muon": ("muon", "trainer.stage=2", *MUON),
    "zero-2-offload": ("four", "trainer.stage=2", "trainer.offload_optimizer=true"),
    "zero-3": ("four", "trainer.stage=3"),
    "ranks-alone": ("two", "trainer.stage=2", "micro_batch_size=4"),
    "ddp": ("four",),
}
"""The run of one process that each is held against, and its settings. Two ranks have half of its micro-batches each;
`ranks-alone` has one on each rank, so that nothing but ranks differs."""
PROBE = ("scaling=sign", "scaling.base_batch_tokens=128", "trainer.precision=32-true")
ROUNDING = 1e-4
"""Ranks sum gradients in another order, in fp32, and train on from what that gave; Newton-Schulz amplifies it."""


@pytest.fixture(scope="module")
def session(runs):
    runs.alone("four", *MEASURE)
    runs.alone("two", *MEASURE, "micro_batch_size=4")
    runs.alone("muon", *MEASURE, *MUON)
    for name, (_, *settings) in CASES.items():
        runs.plan(name, *settings, *MEASURE)
    runs.jobs[-1]["config"] = runs.config("trainer=ddp", "trainer.accelerator=cpu", *MEASURE)
    runs.plan("true", "trainer.stage=2", *MEASURE, "trainer.precision=bf16-true")
    runs.alone("probed", *PROBE)
    runs.plan("probed-2", "trainer.stage=2", *PROBE)
    runs.launch()
    return runs


def averages(folder):
    """(|g|², tr Σ) by kind, as the last checkpoint has them."""
    state = torch.load(folder / "checkpoints/last/training.pt", weights_only=True)
    (found,) = [held for name, held in state["callbacks"].items() if name.startswith("NoiseScale")]
    return found["averages"]


def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name.startswith("noise_scale")} for row in rows]


@pytest.mark.parametrize("name", CASES)
def test_both_estimates_are_those_of_one_process(session, name):
    one, two = averages(session.out / CASES[name][0]), averages(session.out / name)
    assert set(one) == set(two) == {"matrix", "embedding", "vector", "all"}
    for kind, (signal, trace) in one.items():
        assert two[kind] == pytest.approx([signal, trace], rel=ROUNDING), kind


@pytest.mark.parametrize("name", CASES)
def test_what_is_logged_is_what_one_process_logs(session, name):
    one, two = logged(session.out / CASES[name][0]), logged(session.out / name)
    assert [set(row) for row in two] == [set(row) for row in one]
    assert two == [pytest.approx(row, rel=ROUNDING) for row in one]
    last = two[-1]["noise_scale"]
    figures = json.loads((session.out / name / "summary.json").read_text())
    assert figures["noise_scale"] == last > 0
    assert (figures["updates_over_minimum"] - 1) * (figures["tokens_over_minimum"] - 1) == pytest.approx(1.0)


def test_gradients_in_bf16_give_it_to_a_tenth(session):
    one, two = averages(session.out / "four")["all"], averages(session.out / "true")["all"]
    # each element is off by up to 2^-9 of itself, and |g|² is a difference of sums a dozen times as large
    assert two == pytest.approx(one, rel=0.1)


def test_a_probe_on_the_first_rank_sets_the_rate_of_all(session):
    one, two = (load(session.out / name / "config.yaml")["scaling"] for name in ("probed", "probed-2"))
    assert two == one
    assert two["noise_scale"] > 0
    receipts = [(session.out / name / "optimizer.txt").read_text() for name in ("probed", "probed-2")]
    assert receipts[0] == receipts[1]
    assert "sign rule, batch 128 -> 256 tokens, noise scale" in receipts[1]
    assert [(session.out / "probed-2" / f"answer{rank}").read_text() for rank in (0, 1)] == ["finished"] * 2
