import math
import random
import statistics

import pytest

from llm.report.significance import holm, power_law, student_quantile, student_tail, welch


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 12.7, 300.0])
def test_the_tail_probability_of_students_t_equals_its_closed_forms(t):
    # dof 1 is the Cauchy distribution; the integral is elementary for even dof
    assert student_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-11)
    assert student_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), rel=1e-8, abs=1e-15)
    u = t / math.sqrt(4 + t * t)
    assert student_tail(t, 4) == pytest.approx(0.5 - (3 * u - u**3) / 4, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize(
    ("dof", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (10, 2.2281), (30, 2.0423), (1e6, 1.9600)]
)
def test_quantiles_of_students_t_equal_the_printed_table(dof, t):
    assert student_quantile(0.975, dof) == pytest.approx(t, abs=5e-5)  # four printed digits


@pytest.mark.parametrize(
    ("first", "second", "p", "low", "high"),
    [  # scipy 1.17.1, stats.ttest_ind(first, second, equal_var=False)
        ([2.0, 2.2, 2.1], [3.0, 3.2], 0.021522259005241635, -1.5976997448258379, -0.4023002551741621),
        ([1.01, 1.02, 1.0], [1.015, 1.03, 1.09, 0.97], 0.5644008303663783, -0.09298448714083796, 0.060484487140838206),
    ],
)
def test_welch_equals_scipy(first, second, p, low, high):
    result = welch(first, second)
    assert (result.p, result.low, result.high) == pytest.approx((p, low, high), rel=1e-10)
    assert result.low < result.difference < result.high
    assert welch(second, first).p == pytest.approx(p, rel=1e-10)


def test_welchs_test_has_about_its_nominal_rate_of_false_positives():
    rng = random.Random(0)
    trials = 600
    wrong = 0
    for _ in range(trials):
        first = [rng.gauss(0, 1) for _ in range(3)]
        second = [rng.gauss(0, 1) for _ in range(3)]
        wrong += welch(first, second).p < 0.05
    # Welch's test of three against three is known to stay below 5 %; the bound adds three standard errors of 600 trials
    assert 0.01 < wrong / trials < 0.077


def test_welchs_test_of_groups_without_variance_and_of_one_member():
    assert welch([1.0, 1.0], [1.0, 1.0]).p == 1.0
    assert welch([1.0, 1.0], [2.0, 2.0]).p == 0.0
    assert math.isnan(welch([1.0], [2.0, 3.0]).p)
    assert welch([1.0], [2.0, 3.0]).counts == (1, 2)


def test_holms_correction_equals_the_hand_computed_one():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    corrected = holm([0.5, math.nan, 0.9])
    assert corrected[0] == 1.0
    assert math.isnan(corrected[1])


def test_a_power_law_is_recovered_and_its_interval_contains_the_exponent_in_95_percent_of_trials():
    exact = power_law([1, 10, 100], [3.0, 3.0 * 10**-0.2, 3.0 * 100**-0.2])
    assert exact is not None
    assert (exact.coefficient, exact.exponent) == pytest.approx((3.0, -0.2), rel=1e-12)
    assert exact.at(1000) == pytest.approx(3.0 * 1000**-0.2, rel=1e-12)
    rng = random.Random(1)
    held = []
    for _ in range(300):
        xs = [2.0**k for k in range(5)]
        law = power_law(xs, [2 * x**-0.3 * math.exp(rng.gauss(0, 0.1)) for x in xs])
        assert law is not None
        held.append(law.low < -0.3 < law.high)
    assert statistics.fmean(held) == pytest.approx(0.95, abs=0.038)  # three standard errors of 300 trials


def test_two_points_give_a_law_without_an_interval_and_one_point_gives_none():
    law = power_law([1.0, 2.0], [1.0, 4.0])
    assert law is not None
    assert law.exponent == pytest.approx(2.0)
    assert math.isnan(law.low)
    assert power_law([1.0, 1.0], [1.0, 4.0]) is None
