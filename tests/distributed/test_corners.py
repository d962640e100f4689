"""Corner cases of a strategy: parameters that no pass uses, state on the host, blocks that are recomputed."""

import pytest
from distributed_helpers import distance

pytestmark = pytest.mark.slow

FP32 = ("trainer.precision=32-true", "trainer.gradient_clip_val=null")
MUON = ("optimizer=muon", "optimizer.matmul_dtype=float32", *FP32)
ON_THE_HOST = "trainer.offload_optimizer=true"
CASES = {
    "adamw-host-1": ("adamw", "trainer.stage=1", ON_THE_HOST),
    "lion-host-2": ("lion", "trainer.stage=2", ON_THE_HOST),
    "tiger-host-3": ("tiger", "trainer.stage=3", ON_THE_HOST),
    "muon-host-1": ("muon", "trainer.stage=1", ON_THE_HOST),
    "muon-host-2": ("muon", "trainer.stage=2", ON_THE_HOST),
    "muon-host-3": ("muon", "trainer.stage=3", ON_THE_HOST, "trainer.offload_parameters=true"),
    "muon-recomputed-2": ("muon", "trainer.stage=2", "model.activation_checkpointing=2"),
    "muon-recomputed-3": ("muon", "trainer.stage=3", "model.activation_checkpointing=true"),
}
"""The run of one process that each is held against, and what is different on two ranks."""
REFUSED = {"ddp": (), **{f"zero-{stage}": (f"trainer.stage={stage}",) for stage in range(4)}}
WITHIN_ROUNDING = (5e-6, 2e-5)
"""Differences of a loss and of a weight in 4 updates, as gradients are added up in another order."""


def chosen(optimizer):
    return MUON if optimizer == "muon" else (f"optimizer={optimizer}", *FP32)


@pytest.fixture(scope="module")
def session(runs):
    for optimizer in ("adamw", "lion", "tiger", "muon"):
        runs.alone(optimizer, *chosen(optimizer))
    for name, (optimizer, *settings) in CASES.items():
        runs.plan(name, *chosen(optimizer), *settings)
    runs.launch()
    return runs


@pytest.fixture(scope="module")
def spare(runs, ddp):
    """Two ranks, with a matrix and a gain in each block that no pass uses."""
    for name, settings in REFUSED.items():
        options = ddp if name == "ddp" else {}
        runs.plan(f"spare-{name}", *MUON, *settings, mutant="keep_spare_parameters", may_fail=True, **options)
    runs.launch()
    return runs


@pytest.mark.parametrize("name", CASES)
def test_what_saves_memory_changes_nothing(session, name):
    loss, weight = distance(session.out / name, session.out / CASES[name][0])
    assert loss <= WITHIN_ROUNDING[0]
    assert weight <= WITHIN_ROUNDING[1]


@pytest.mark.parametrize("name", REFUSED)
def test_a_parameter_without_a_gradient_is_named_by_every_rank_before_anything_moves(spare, name):
    folder = spare.out / f"spare-{name}"
    for rank in (0, 1):
        answer = (folder / f"answer{rank}").read_text()
        assert answer.startswith(
            "ConfigError: model.layers.0.spare.0.weight: no loss depends on it (4 such parameters)"
        )
    assert not list((folder / "checkpoints").glob("step-*"))
