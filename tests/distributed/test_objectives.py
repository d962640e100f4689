"""Two ranks train every objective as one process does."""

import pytest
from catalogue import options
from distributed_helpers import distance

pytestmark = pytest.mark.slow

NEEDS = {"block": ("objective.block_length=8",)}
FP32 = ("trainer.precision=32-true", "optimizer=adamw", "callbacks.samples=null")
NAMES = options("objective")
WITHIN_ROUNDING = (5e-6, 2e-5)
"""Differences of a loss and of a weight in 4 updates: sums over ranks are taken in another order."""
DDP = ("trainer=ddp", "trainer.accelerator=cpu")


@pytest.fixture(scope="module")
def session(runs):
    """One process for each objective, and one session of two ranks with DDP and with ZeRO stage 3."""
    for name in NAMES:
        own = (f"objective={name}", *NEEDS.get(name, ()), *FP32)
        runs.alone(name, *own)
        runs.plan(f"{name}-ddp", *own, strategy=DDP)
        runs.plan(f"{name}-zero", *own, "trainer.stage=3")
    runs.launch()
    return runs


@pytest.mark.parametrize("ranks", ["ddp", "zero"])
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_as_one_process_does(session, name, ranks):
    loss, weight = distance(session.out / f"{name}-{ranks}", session.out / name)
    assert loss <= WITHIN_ROUNDING[0]
    assert weight <= WITHIN_ROUNDING[1]
