import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.sampler import RunSampler
from llm.errors import ConfigError
from llm.run_folder.checkpoint import load_model
from llm.scaling.batch_schedule import constant_batch, doubling, stages
from llm.scaling.batching import BatchRamp, check_ramp, plan_batch, plan_ramp
from llm.training.train import train

RAMP = ("batch_schedule=stages", "batch_schedule.starts=[0,192,600]", "micro_batch_size=4")
"""256 tokens per update in the end: 64, 64, 64, then 128 x 4 (704 > 600), then 256."""


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_stages_are_shares_of_the_full_batch():
    assert constant_batch(batch_tokens=4096) == {0: 4096}
    assert stages(batch_tokens=4096, starts=[0, 10_000], shares=[0.25, 1.0]) == {0: 1024, 10_000: 4096}
    assert doubling(batch_tokens=4096, start_share=0.25, every_tokens=5000) == {0: 1024, 5000: 2048, 10_000: 4096}


def test_a_stage_begins_with_the_first_update_that_has_seen_its_tokens():
    ramp = plan_ramp({0: 64, 192: 128, 600: 256}, max_steps=9, max_tokens=None)
    assert ramp.stages == ((0, 0, 64), (3, 192, 128), (7, 704, 256))
    assert [ramp.batch_tokens_at(step) for step in range(9)] == [64, 64, 64, 128, 128, 128, 128, 256, 256]
    assert ramp.tokens_seen(9) == 704 + 512


@given(
    st.dictionaries(st.integers(1, 5000), st.integers(1, 400), max_size=4), st.integers(1, 400), st.integers(1, 9000)
)
def test_tokens_seen_add_up_and_each_update_has_the_batch_of_its_tokens(later, first, max_tokens):
    changes = {0: first, **later}
    if max_tokens < first:
        return
    ramp = plan_ramp(changes, max_steps=None, max_tokens=max_tokens)
    seen = 0
    for step in range(ramp.total_steps):
        assert ramp.tokens_seen(step) == seen
        assert ramp.batch_tokens_at(step) == changes[max(start for start in changes if start <= seen)]
        seen += ramp.batch_tokens_at(step)
    assert seen == ramp.tokens_seen(ramp.total_steps) <= max_tokens


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 8), (1, 4), (2, 4), (2, 2), (4, 2)])
def test_updates_see_the_same_windows_for_any_number_of_ranks(world_size, micro_batch_size):
    ramp = plan_ramp({0: 128, 384: 256}, max_steps=6, max_tokens=None)

    def sampler(rank, world_size, micro_batch_size):
        return RunSampler(
            num_windows=50,
            seed=3,
            windows_per_step=8,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            total_steps=6,
            start_step=lambda: 0,
            span_of_step=lambda step: (ramp.tokens_seen(step) // 32, ramp.batch_tokens_at(step) // 32),
        )

    def updates(samplers):
        lists = [list(s) for s in samplers]
        count = samplers[0].accumulation
        steps = [[rows for ls in lists for rows in ls[step * count : (step + 1) * count]] for step in range(6)]
        return [sorted(n for rows in step for n in rows) for step in steps]

    whole = updates([sampler(0, 1, 8)])
    shared = [sampler(rank, world_size, micro_batch_size) for rank in range(world_size)]
    assert [len(step) for step in whole] == [4, 4, 4, 8, 8, 8]
    assert updates(shared) == whole
    assert len({len(rows) for s in shared for rows in s}) == 2  # equally many on each, in each stage


def test_a_ramped_run_follows_its_stages_and_its_rates_the_rule(composed, tiny, tmp_path):
    rule = ("scaling=sqrt", "scaling.base_batch_tokens=64", "schedule=constant", "schedule.warmup=0", "max_steps=9")
    train(composed(*tiny, *RAMP, *rule), tmp_path)
    rows = rows_of(tmp_path)
    assert [row["batch_tokens"] for row in rows] == [64, 64, 64, 128, 128, 128, 128, 256, 256]
    assert [row["tokens_seen"] for row in rows] == [64, 128, 192, 320, 448, 576, 704, 960, 1216]
    assert [row["lr/matrix"] for row in rows] == pytest.approx(
        [4e-3 * (row["batch_tokens"] / 64) ** 0.5 for row in rows]
    )
    text = (tmp_path / "optimizer.txt").read_text()
    assert "lr 4.0e-3 as given: sqrt rule at its base, batch 64 tokens" in text
    assert "lr 4.0e-3 -> 8.0e-3: sqrt rule, batch 64 -> 256 tokens" in text


def test_a_ramped_run_that_is_resumed_in_a_stage_equals_an_uninterrupted_one_bit_for_bit(composed, tiny, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = (
        *RAMP,
        "max_steps=9",
        "checkpoint_every=5",
        "schedule=constant",
        "schedule.warmup=0",
        "model.dropout=0.1",
    )
    for folder in (whole, broken):
        folder.mkdir()
    train(composed(*tiny, *settings), whole)
    train({**composed(*tiny, *settings), "max_steps": 5}, broken)
    train({**composed(*tiny, *settings), "resume": str(broken)}, broken)
    assert [r["train/loss"] for r in rows_of(broken)] == [r["train/loss"] for r in rows_of(whole)]
    weights = [load_model((folder / "checkpoints/last").resolve()) for folder in (whole, broken)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


def test_a_stage_that_does_not_divide_is_refused_before_anything_is_built(composed, tiny, tmp_path):
    plan = plan_batch(batch_tokens=256, context_length=32, world_size=1, micro_batch_size=4)
    with pytest.raises(
        ConfigError, match=r"batch_schedule: 96 tokens per update from 0 tokens on: .* = 64.*try 64 or 128"
    ):
        check_ramp(plan=plan, ramp=BatchRamp(((0, 0, 96),), 3))
    with pytest.raises(ConfigError, match="batch_schedule: 32 tokens per update"):
        train(composed(*tiny, "batch_schedule=doubling", "batch_schedule.start_share=0.125"), tmp_path)


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        (stages, {"starts": [5], "shares": [1.0]}, "must rise from 0"),
        (stages, {"starts": [], "shares": []}, "must rise from 0"),
        (stages, {"starts": [0, 9, 9], "shares": [0.5, 0.5, 1.0]}, "must rise from 0"),
        (stages, {"starts": [0, 9], "shares": [1.0]}, "needs one for each"),
        (stages, {"starts": [0], "shares": [1.5]}, r"must lie in \(0, 1\]"),
        (stages, {"starts": [0], "shares": [0.3]}, r"gives 1228\.8 of batch_tokens=4096"),
        (doubling, {"start_share": 0.3, "every_tokens": 100}, "must be 1/2, 1/4"),
        (doubling, {"start_share": 0.25, "every_tokens": 0}, "must be at least 1"),
    ],
)
def test_invalid_settings_of_a_ramp_are_refused(rule, settings, message):
    with pytest.raises(ConfigError, match=message):
        rule(batch_tokens=4096, **settings)
