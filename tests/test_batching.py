import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.errors import ConfigError
from llm.scaling.batching import micro_batch_candidates, plan_batch, total_steps


@given(context=st.integers(1, 64), world=st.integers(1, 8), micro=st.integers(1, 16), accumulation=st.integers(1, 16))
def test_the_plan_multiplies_back_to_batch_tokens(context, world, micro, accumulation):
    tokens = context * world * micro * accumulation
    plan = plan_batch(batch_tokens=tokens, context_length=context, world_size=world, micro_batch_size=micro)
    assert plan.accumulation == accumulation
    assert plan.accumulation * world * micro * context == tokens


def test_the_error_for_an_uneven_batch_names_the_nearest_valid_values():
    with pytest.raises(ConfigError, match=r"batch_tokens=1000: .* = 512; try 512 or 1024"):
        plan_batch(batch_tokens=1000, context_length=64, world_size=2, micro_batch_size=4)


def test_more_devices_than_a_micro_batch_allows_are_answered_with_the_largest_one_that_fits():
    with pytest.raises(ConfigError, match=r"set micro_batch_size=2, or batch_tokens=256$"):
        plan_batch(batch_tokens=128, context_length=32, world_size=2, micro_batch_size=4)


def test_candidates_are_the_divisors_of_an_update_largest_first():
    sizes = {"batch_tokens": 12 * 64, "context_length": 64}
    assert micro_batch_candidates(**sizes, world_size=2) == [6, 3, 2, 1]
    assert micro_batch_candidates(**sizes, world_size=2, least=3) == [3, 2, 1]
    assert micro_batch_candidates(**sizes, world_size=1, least=100) == [1]


def test_steps_follow_from_tokens():
    assert total_steps(max_steps=None, max_tokens=1_000_000, batch_tokens=8192) == 122


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_steps": None, "max_tokens": None}, "exactly one"),
        ({"max_steps": 5, "max_tokens": 5}, "exactly one"),
        ({"max_steps": 0, "max_tokens": None}, "max_steps=0"),
        ({"max_steps": None, "max_tokens": 100}, "max_tokens=100: gives 0 updates"),
    ],
)
def test_a_run_without_updates_is_refused(limits, message):
    with pytest.raises(ConfigError, match=message):
        total_steps(**limits, batch_tokens=8192)
