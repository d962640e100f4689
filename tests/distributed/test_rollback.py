"""Two ranks roll back to a checkpoint together, with the results of one process."""

import json

import pytest
import torch
from distributed_helpers import distance, losses, weights

from llm.run_folder.rollback import FILE

pytestmark = pytest.mark.slow

BACK = ("spikes=rollback", "spikes.sigma=1e3", "max_steps=8", "val_every=8", "trainer.precision=32-true")
MUTANT = {"mutant": "poison_second_rank_until_it_went_back"}
WITHIN_ROUNDING = (2e-5, 2e-4)
"""Differences of a loss and of a weight, as between one process and two that never went back."""
CASES = {"ddp": (), "zero-1": ("trainer.stage=1",), "zero-3": ("trainer.stage=3",)}


@pytest.fixture(scope="module")
def session(runs, ddp):
    """At step 4, and one checkpoint later at step 6, the second rank's loss is not a number."""
    for name, settings in CASES.items():
        runs.plan(name, *settings, *BACK, **MUTANT, **(ddp if name == "ddp" else {}))
    runs.plan("too-often", "trainer.stage=2", *BACK, "spikes.max_rollbacks=1", may_fail=True, **MUTANT)
    runs.launch()
    runs.as_killed_after(2, runs.out / "zero-1", "again")
    runs.plan("again", "trainer.stage=1", *BACK, resume=True)
    runs.launch()
    runs.as_killed_after(2, runs.out / "zero-1", "one")
    runs.alone("one", *BACK, resume=True)
    return runs


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_go_back_together_as_one_process_does(session, name):
    entries = json.loads((session.out / name / FILE).read_text())
    assert [(entry["step"], entry["to"], entry["left_out"]) for entry in entries] == [
        (4, 2, [16, 32]),
        (6, 4, [48, 64]),
    ]
    assert [(session.out / name / f"answer{rank}").read_text() for rank in (0, 1)] == ["finished"] * 2
    assert sorted(losses(session.out / name)) == list(range(1, 9))
    # one process that excludes the same windows, from the checkpoint that both have
    loss, weight = distance(session.out / name, session.out / "one")
    assert loss <= WITHIN_ROUNDING[0]
    assert weight <= WITHIN_ROUNDING[1]


def test_windows_that_two_ranks_excluded_stay_excluded_after_a_kill(session):
    again, whole = session.out / "again", session.out / "zero-1"
    assert losses(again) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(again).values(), weights(whole).values(), strict=True))


def test_every_rank_stops_where_the_run_may_go_back_no_more(session):
    for rank in (0, 1):
        answer = (session.out / "too-often" / f"answer{rank}").read_text()
        assert answer.startswith("SpikeError: step 6: loss=")
        assert "grad_norm=nan is not finite; spikes.max_rollbacks=1: the run has reached this limit" in answer
