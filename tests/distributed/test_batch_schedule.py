"""A growing batch on two ranks, compared with one process: the same windows in each update and the same training."""

import json

import pytest
from distributed_helpers import distance

pytestmark = pytest.mark.slow

RAMP = (
    "batch_schedule=stages", "batch_schedule.starts=[0,192,600]", "micro_batch_size=4", "max_steps=9", "val_every=9",
    "checkpoint_every=5", "scaling=sqrt", "trainer.precision=32-true",
)  # fmt: skip
"""256 tokens per update in the end: 64 x 3, 128 x 4, 256 x 2."""


@pytest.fixture(scope="module")
def session(runs):
    """One process with two micro-batches per update; two ranks with one each, of which one run resumes in a stage."""
    runs.alone("one", *RAMP)
    runs.plan("two", "trainer.stage=2", *RAMP)
    runs.launch()
    runs.as_killed_after(5, runs.out / "two", "resumed")
    runs.plan("resumed", "trainer.stage=1", *RAMP, resume=True)
    runs.launch()
    return runs


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["two", "resumed"])
def test_two_ranks_grow_their_batch_as_one_process_does(session, name):
    loss, weight = distance(session.out / name, session.out / "one")
    assert loss <= 2e-5  # the norm that clips is summed in another order
    assert weight <= 2e-4
    keys = ("batch_tokens", "tokens_seen", "lr/matrix")
    assert [[row[k] for k in keys] for row in rows(session.out / name)] == [
        [row[k] for k in keys] for row in rows(session.out / "one")
    ]
    assert [row["batch_tokens"] for row in rows(session.out / name)] == [64] * 3 + [128] * 4 + [256] * 2
