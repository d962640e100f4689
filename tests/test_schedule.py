import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.errors import ConfigError
from llm.scaling.schedule import constant, cosine, inverse_time, piecewise, wsd

TOTAL = 1000


def test_warmup_rises_in_equal_steps_and_never_gives_zero():
    factors = [constant(step, total_steps=TOTAL, warmup=4) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_warmup_below_one_is_a_share_of_the_run():
    assert constant(49, total_steps=TOTAL, warmup=0.05) == 1.0
    assert constant(48, total_steps=TOTAL, warmup=0.05) == pytest.approx(49 / 50)


def test_cosine_is_one_after_warmup_half_way_at_the_middle_and_at_its_floor_at_the_end():
    at = lambda step: cosine(step, total_steps=TOTAL, warmup=100, floor=0.1)  # noqa: E731
    assert at(99) == at(100) == 1.0
    middle = 100 + (TOTAL - 1 - 100) / 2
    assert at(int(middle)) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (int(middle) - 100) / 899)))
    assert at(TOTAL - 1) == pytest.approx(0.1)


def test_wsd_holds_until_its_decay_and_ends_at_its_floor():
    at = lambda step: wsd(step, total_steps=TOTAL, warmup=100, decay=200, floor=0.0, shape="linear")  # noqa: E731
    assert at(100) == at(799) == 1.0
    assert at(899) == pytest.approx(0.5)
    assert at(TOTAL - 1) == pytest.approx(0.0)


def test_the_sqrt_decay_falls_faster_at_first():
    linear, root = (wsd(850, total_steps=TOTAL, warmup=0, decay=200, floor=0.0, shape=s) for s in ("linear", "sqrt"))
    assert root < linear


def test_piecewise_runs_straight_through_its_points():
    at = lambda step: piecewise(step, total_steps=TOTAL, points={100: 1.0, 500: 0.5, 1.0: 0.0})  # noqa: E731
    assert at(49) == pytest.approx(0.5)
    assert at(99) == pytest.approx(1.0)
    assert at(299) == pytest.approx(0.75)
    assert at(TOTAL - 1) == pytest.approx(0.0)


@given(
    step=st.integers(0, 2000),
    total=st.integers(2, 2000),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.49),
    floor=st.floats(0, 1),
)
def test_every_factor_lies_between_zero_and_one(step, total, warmup, decay, floor):
    step = min(step, total - 1)
    factors = [
        constant(step, total_steps=total, warmup=warmup),
        cosine(step, total_steps=total, warmup=warmup, floor=floor),
        wsd(step, total_steps=total, warmup=warmup, decay=decay, floor=floor, shape="sqrt"),
    ]
    assert all(-1e-12 <= f <= 1 + 1e-12 for f in factors)


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda: constant(0, total_steps=10, warmup=11), "schedule.warmup=11"),
        (lambda: constant(0, total_steps=10, warmup=-1), "schedule.warmup=-1"),
        (lambda: cosine(0, total_steps=10, warmup=0, floor=1.5), "schedule.floor=1.5"),
        (lambda: wsd(0, total_steps=10, warmup=6, decay=6, floor=0, shape="linear"), "schedule.decay=6"),
        (lambda: piecewise(0, total_steps=10, points={}), "schedule.points"),
        (lambda: piecewise(0, total_steps=10, points={5: 1.0, 2: 0.5}), "times must rise"),
    ],
)
def test_a_bad_setting_names_its_key(call, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        call()


def test_inverse_time_halves_after_its_half_life_and_is_a_third_after_two():
    at = lambda step: inverse_time(step, total_steps=TOTAL, warmup=100, half_life=0.2)  # noqa: E731
    assert at(99) == at(100) == 1.0
    assert at(300) == pytest.approx(1 / 2)
    assert at(500) == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match=r"schedule\.half_life=0"):
        inverse_time(0, total_steps=TOTAL, warmup=0, half_life=0)
