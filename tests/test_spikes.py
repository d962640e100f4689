import copy
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.errors import ConfigError
from llm.training.spikes import RollbackGuard, SpikeGuard


def guard(**changes):
    return SpikeGuard(**{"sigma": 6.0, "window": 16, "max_in_a_row": 3} | changes)


def ordinary(number, seed=0):
    chance = random.Random(seed)
    return [(3 + chance.gauss(0, 0.1), 1 + chance.gauss(0, 0.05)) for _ in range(number)]


def test_a_jump_of_either_figure_is_refused_and_does_not_change_the_mean():
    spikes = guard()
    assert not any(spikes.judge(*pair) for pair in ordinary(40))
    before = spikes.state_dict()["accepted"]
    assert spikes.judge(9.0, 1.0).startswith("loss=9 is over 6 sigma above ")
    assert spikes.judge(3.0, 9.0).startswith("grad_norm=9 ")
    assert spikes.state_dict()["accepted"] == before
    assert spikes.judge(3.0, 1.0) == ""


def test_nothing_is_refused_before_the_window_is_full():
    spikes = guard()
    assert not any(spikes.judge(*pair) for pair in [*ordinary(15), (100.0, 100.0)])


def test_a_change_that_stays_is_taken_and_counted_from_anew():
    spikes = guard()
    for pair in ordinary(40):
        spikes.judge(*pair)
    answers = [bool(spikes.judge(9.0, 1.0)) for _ in range(20)]
    assert answers == [True] * 3 + [False] * 17


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=60), st.integers(0, 59))
def test_a_guard_restored_from_its_state_judges_as_one_that_went_on(pairs, cut):
    whole, first = guard(window=4, sigma=2.0), guard(window=4, sigma=2.0)
    expected = [whole.judge(*pair) for pair in pairs]
    got = [first.judge(*pair) for pair in pairs[:cut]]
    second = guard(window=4, sigma=2.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert got + [second.judge(*pair) for pair in pairs[cut:]] == expected


@given(st.lists(st.floats(0, 1e6), min_size=8, max_size=8), st.floats(0, 1e6))
def test_a_loss_below_the_mean_is_never_a_spike(values, value):
    spikes = guard(window=8)
    for each in values:
        spikes.judge(each, 1.0)
    if value <= min(values):
        assert spikes.judge(value, 1.0) == ""


@pytest.mark.parametrize("wrong", [{"sigma": 0.0}, {"sigma": float("inf")}, {"window": 1}, {"max_in_a_row": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=rf"spikes\.{next(iter(wrong))}="):
        guard(**wrong)


def test_a_guard_that_goes_back_refuses_each_spike_and_takes_over_the_state_of_one_that_skips():
    before, after = guard(), RollbackGuard(sigma=6.0, window=16, past=0, max_rollbacks=1)
    for pair in ordinary(40):
        before.judge(*pair)
    assert [bool(before.judge(9.0, 1.0)) for _ in range(3)] == [True] * 3
    after.load_state_dict(before.state_dict())
    assert [bool(after.judge(9.0, 1.0)) for _ in range(9)] == [True] * 9
    assert after.judge(3.0, 1.0) == ""
    assert (before.goes_back, after.goes_back) == (False, True)
