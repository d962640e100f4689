"""Resuming on two ranks: any stage and number of ranks reads checkpoints of ZeRO, which equal those of one process."""

import json
from itertools import product

import pytest
import torch
from catalogue import options as options_of
from covering import every_pair, name_of
from distributed_helpers import losses, weights

FP32 = ("trainer.precision=32-true", "optimizer.matmul_dtype=float32", "trainer.gradient_clip_val=null")
"""Gradients are summed in another order on 1 rank and on 2: in fp32 alone that stays in the last bits."""
MUON = ("optimizer=muon", "optimizer.row_beta=0.95", "optimizer.aux=adamw", *FP32)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def session(runs):
    """Runs of 4 updates, and runs that resume from their 2nd: on as many ranks, on fewer, on more, at other stages."""
    runs.alone("one", *MUON)
    runs.plan("two", *MUON, "trainer.stage=2")
    runs.plan("three", *MUON, "trainer.stage=3")
    runs.launch()
    runs.as_killed_after(2, runs.out / "two", "two-again")
    runs.plan("two-again", *MUON, "trainer.stage=2", resume=True)
    runs.as_killed_after(2, runs.out / "three", "three-to-one-stage")
    runs.plan("three-to-one-stage", *MUON, "trainer.stage=1", resume=True)
    runs.as_killed_after(2, runs.out / "one", "one-to-two")
    runs.plan("one-to-two", *MUON, "trainer.stage=3", resume=True)
    runs.launch()
    runs.as_killed_after(2, runs.out / "three", "two-to-one")
    runs.alone("two-to-one", *MUON, resume=True)
    return runs


def test_the_same_ranks_resume_to_the_same_losses_and_weights(session):
    again, whole = session.out / "two-again", session.out / "two"
    assert losses(again) == losses(whole)
    assert all(torch.equal(a, b) for a, b in zip(weights(again).values(), weights(whole).values(), strict=True))


@pytest.mark.parametrize("name", ["three-to-one-stage", "one-to-two", "two-to-one"])
def test_other_ranks_and_stages_resume_to_the_same_losses(session, name):
    found, wanted = losses(session.out / name), losses(session.out / "one")
    assert sorted(found) == [1, 2, 3, 4]
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, abs=2e-5), step  # fp32, amplified by Newton-Schulz


def test_a_checkpoint_of_shards_has_what_one_process_writes(session):
    one, two = (session.out / name / "checkpoints/last" for name in ("one", "three"))
    states = [torch.load(folder / "training.pt", weights_only=True)["optimizer_states"][0] for folder in (one, two)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, held in states[0]["state"].items():
        other = states[1]["state"][index]
        assert held.keys() == other.keys(), index
        for key, value in held.items():
            if isinstance(value, torch.Tensor):
                assert value.shape == other[key].shape, (index, key)
                torch.testing.assert_close(other[key], value, rtol=1e-3, atol=1e-4)
    names = [[group["names"] for group in state["param_groups"]] for state in states]
    assert names[0] == names[1]
    assert json.loads((two / "manifest.json").read_text())["step"] == 4


MODELS = {
    "dense": (),
    "moe": ("model=moe", "model.ffn.num_experts=4"),
    "vq": ("model/attention=vq", "model/position=none"),
}
PAIRS = every_pair({"optimizer": options_of("optimizer"), "model": list(MODELS), "dropout": ["0.0", "0.1"]})
ROWS = {model: [row for row in PAIRS if row["model"] == model] for model in MODELS}


STRATEGIES = {"ddp": (), **{f"zero-{stage}": (f"trainer.stage={stage}",) for stage in (1, 2, 3)}}


@pytest.fixture(scope="module", params=product(STRATEGIES, MODELS), ids="-".join)
def resumed(request, runs, ddp):
    """Runs of 4 updates of one model on two ranks under one strategy, and runs that resume from their 2nd."""
    strategy, model = request.param
    for again in ("", "-again"):
        for row in ROWS[model]:
            whole = f"{strategy}-{name_of(row)}"
            if again:
                runs.as_killed_after(2, runs.out / whole, whole + again)
            chosen = (f"optimizer={row['optimizer']}", f"model.dropout={row['dropout']}", *MODELS[model])
            options = ddp if strategy == "ddp" else {}
            runs.plan(whole + again, *STRATEGIES[strategy], *chosen, resume=bool(again), **options)
        runs.launch()
    return [[runs.out / f"{strategy}-{name_of(row)}{end}" for end in ("", "-again")] for row in ROWS[model]]


def test_two_ranks_resume_exactly_with_every_optimizer_and_model_under_every_strategy(resumed):
    for whole, again in resumed:
        assert losses(again) == losses(whole), again.name
        pairs = zip(weights(again).values(), weights(whole).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), again.name
