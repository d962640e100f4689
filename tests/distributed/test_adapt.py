"""Two ranks train beside frozen weights as one process does, save the same, and resume."""

import pytest
import torch
from distributed_helpers import distance, losses, weights

pytestmark = pytest.mark.slow

FP32 = "trainer.precision=32-true"
WITHIN_ROUNDING = (5e-6, 2e-5)
"""As in tests/distributed/test_zero.py."""


@pytest.fixture(scope="module")
def session(runs, ddp):
    source = runs.alone("source", FP32, "optimizer.lr=1e-2")
    for kind in ("ladder", "lora"):
        given = (FP32, f"adapt={kind}", f"init_from={source}", "optimizer.lr=1e-2")
        runs.alone(kind, *given)
        for stage in (0, 1, 2):
            runs.plan(f"{kind}-{stage}", *given, f"trainer.stage={stage}")
        runs.plan(f"{kind}-ddp", *given, **ddp)
    runs.launch()
    again = (FP32, "adapt=ladder", f"init_from={source}", "optimizer.lr=1e-2", "trainer.stage=2")
    runs.as_killed_after(2, runs.out / "ladder-2", "resumed")
    runs.plan("resumed", *again, resume=True)
    runs.launch()
    return runs


@pytest.mark.parametrize("kind", ["ladder", "lora"])
@pytest.mark.parametrize("strategy", ["0", "1", "2", "ddp"])
def test_two_ranks_train_beside_frozen_weights_as_one_process_does(session, kind, strategy):
    loss, weight = distance(session.out / f"{kind}-{strategy}", session.out / kind)
    assert loss <= WITHIN_ROUNDING[0]
    assert weight <= WITHIN_ROUNDING[1]
    marks = {"ladder": "ladder.", "lora": "lora_"}
    assert all(marks[kind] in name for name in weights(session.out / f"{kind}-{strategy}"))


def test_a_ladder_on_two_ranks_resumes(session):
    assert losses(session.out / "resumed")[4] == losses(session.out / "ladder-2")[4]
    ours, theirs = (weights(session.out / name) for name in ("resumed", "ladder-2"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
