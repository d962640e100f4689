import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sampler import RunSampler, numbers_at, permute, run_windows, united, validation_windows
from llm.errors import ConfigError

seeds = st.integers(-(2**63), 2**63)


def make(**changes):
    defaults = {
        "num_windows": 101,
        "seed": 7,
        "windows_per_step": 24,
        "micro_batch_size": 2,
        "rank": 0,
        "world_size": 1,
        "total_steps": 9,
        "start_step": lambda: 0,
    }
    return RunSampler(**defaults | changes)


@given(st.integers(1, 3000), seeds)
def test_permute_is_a_bijection(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size=size, key=key)), np.arange(size))


@given(st.integers(1, 2**62), seeds, st.data())
def test_permute_works_for_sizes_beyond_any_memory(size, key, data):
    index = data.draw(st.integers(0, size - 1))
    image = permute(np.array([index]), size=size, key=key)
    assert 0 <= image[0] < size


@settings(max_examples=50)
@given(st.integers(1, 200), seeds, st.integers(0, 3))
def test_each_epoch_visits_each_window_once(num_windows, seed, epoch):
    start = epoch * num_windows
    seen = run_windows(start, start + num_windows, num_windows=num_windows, seed=seed)
    assert sorted(seen.tolist()) == list(range(num_windows))


@given(st.integers(1, 200), seeds, st.integers(0, 500), st.integers(0, 100))
def test_a_window_depends_on_its_number_alone(num_windows, seed, start, count):
    together = run_windows(start, start + count, num_windows=num_windows, seed=seed)
    alone = [run_windows(n, n + 1, num_windows=num_windows, seed=seed)[0] for n in range(start, start + count)]
    assert together.tolist() == alone


def test_epochs_and_seeds_differ_in_their_order():
    first = run_windows(0, 1000, num_windows=1000, seed=0)
    assert not np.array_equal(first, run_windows(1000, 2000, num_windows=1000, seed=0))
    assert not np.array_equal(first, run_windows(0, 1000, num_windows=1000, seed=1))
    assert not np.array_equal(
        run_windows(1000, 2000, num_windows=1000, seed=0), run_windows(0, 1000, num_windows=1000, seed=1)
    )


def test_the_order_looks_random():
    """Of a random order, neighbours are uncorrelated (standard error 1/sqrt(n)) and one image in n stays in place."""
    n = 1 << 16
    order = run_windows(0, n, num_windows=n, seed=3).astype(float)
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(n)
    assert (order == np.arange(n)).sum() < 10  # Poisson with mean 1: more than 9 once in 1e7
    halves = (order[: n // 2] < n / 2).sum()  # hypergeometric: standard deviation sqrt(n) / 4
    assert abs(halves - n / 4) < 5 * np.sqrt(n) / 4


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 24), (1, 1), (2, 3), (3, 4), (4, 6), (24, 1)])
def test_a_step_reads_the_same_windows_for_any_number_of_ranks(world_size, micro_batch_size):
    whole = np.array([n for batch in make(micro_batch_size=24) for n in batch]).reshape(9, 24)
    shares = [
        list(make(world_size=world_size, micro_batch_size=micro_batch_size, rank=rank)) for rank in range(world_size)
    ]
    rows = np.array(shares)  # rank, micro-batch of the run, row
    steps = rows.reshape(world_size, 9, -1, micro_batch_size).transpose(1, 2, 0, 3).reshape(9, 24)
    assert np.array_equal(steps, whole)


spans = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 120)), max_size=6)


@given(spans)
def test_united_spans_have_the_same_numbers_in_ascending_separate_spans(some):
    whole = united(some)
    assert {n for start, stop in whole for n in range(start, stop)} == {n for a, b in some for n in range(a, b)}
    assert all(before[1] < after[0] for before, after in itertools.pairwise(whole))


@given(spans, spans)
def test_spans_may_be_united_in_any_order_and_twice(some, more):
    assert united([*united(some), *more]) == united([*more, *some, *some])


@given(spans)
def test_excluded_windows_are_missing_and_all_others_follow_in_order(some):
    left_out = united(some)
    kept = [n for n in range(400) if not any(start <= n < stop for start, stop in left_out)]
    assert numbers_at(np.arange(200), left_out).tolist() == kept[:200]


@settings(max_examples=30)
@given(spans, st.integers(0, 8), st.sampled_from([1, 2, 4]))
def test_a_sampler_with_excluded_windows_divides_the_others_over_any_ranks_from_any_step(some, step, world_size):
    left_out = united(some)
    whole = run_windows(0, 600, num_windows=101, seed=7).tolist()
    kept = [whole[n] for n in range(600) if not any(start <= n < stop for start, stop in left_out)]
    changes = {"world_size": world_size, "left_out": left_out, "start_step": lambda: step}
    shares = [list(make(rank=rank, **changes)) for rank in range(world_size)]
    dealt = [n for parts in zip(*shares, strict=True) for part in parts for n in part]
    assert dealt == kept[step * 24 : 9 * 24]


@given(st.integers(0, 9), st.sampled_from([1, 2, 4]))
def test_starting_at_a_step_equals_skipping_the_steps_before(step, world_size):
    sampler = make(world_size=world_size, rank=world_size - 1)
    resumed = make(world_size=world_size, rank=world_size - 1, start_step=lambda: step)
    assert list(resumed) == list(sampler)[step * sampler.accumulation :]
    assert len(resumed) == len(sampler) == 9 * sampler.accumulation


def test_windows_that_do_not_divide_over_the_devices_are_refused():
    with pytest.raises(ConfigError, match="micro_batch_size=5: 1 devices with 5 windows each must divide the 24"):
        make(micro_batch_size=5)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 9))
def test_validation_windows_are_shared_equally_and_never_twice(num_windows, limit, world_size):
    shares = [
        validation_windows(num_windows=num_windows, limit=limit, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    together = np.concatenate(shares)
    assert len({len(share) for share in shares}) == 1
    assert len(set(together.tolist())) == len(together) <= min(num_windows, limit)
    assert all(0 <= n < num_windows for n in together)
    assert all(np.all(np.diff(share) > 0) for share in shares)


@given(st.integers(8, 500), st.integers(8, 500), st.sampled_from([1, 2, 4, 8]))
def test_one_to_eight_devices_validate_on_the_same_windows(num_windows, limit, world_size):
    alone = validation_windows(num_windows=num_windows, limit=limit, rank=0, world_size=1)
    shares = [
        validation_windows(num_windows=num_windows, limit=limit, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert sorted(np.concatenate(shares).tolist()) == alone.tolist()
