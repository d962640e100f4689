import math
from functools import partial

import pytest
from catalogue import options
from hypothesis import given
from hypothesis import strategies as st

from llm.config.pieces import instantiate
from llm.errors import ConfigError
from llm.scaling.rules import adam_eps, linear, none, sign, sqrt, variance

RULES = {
    "none": none,
    "linear": linear,
    "sqrt": sqrt,
    "variance": partial(variance, noise_scale=40_000),
    "sign": partial(sign, noise_scale=40_000, alignment=1.0),
    "adam_eps": partial(adam_eps, noise_scale=40_000, alignment=1.0, eps_to_gradient=1.0),
}
NOISY = [name for name in RULES if name not in ("none", "linear", "sqrt")]
batches = st.integers(1, 2**30)


@pytest.mark.parametrize("name", options("scaling"))
def test_every_option_with_its_default_settings_is_one_at_the_base_batch(composed, name):
    assert instantiate(composed(f"scaling={name}")["scaling"])(8192) == 1.0


@given(batches, batches, batches, st.sampled_from(sorted(RULES)))
def test_scaling_through_a_third_batch_gives_the_same_factor(base, middle, batch, name):
    rule = RULES[name]
    direct = rule(batch, base_batch_tokens=base)
    detour = rule(middle, base_batch_tokens=base) * rule(batch, base_batch_tokens=middle)
    assert detour == pytest.approx(direct, rel=1e-12)


def test_four_times_the_batch_gives_four_twice_or_the_same_rate():
    assert linear(32768, base_batch_tokens=8192) == 4.0
    assert sqrt(32768, base_batch_tokens=8192) == 2.0
    assert none(32768, base_batch_tokens=8192) == 1.0


def test_far_below_the_noise_scale_sgd_is_linear_and_signs_follow_the_root():
    few, more, scale = 1000, 4000, 1e12
    assert variance(more, base_batch_tokens=few, noise_scale=scale) == pytest.approx(4.0, rel=1e-6)
    assert sign(more, base_batch_tokens=few, noise_scale=scale, alignment=3.0) == pytest.approx(2.0, rel=1e-6)


def test_far_above_the_noise_scale_every_law_is_constant():
    for name in NOISY:
        assert RULES[name](2**40, base_batch_tokens=2**35) == pytest.approx(1.0, rel=1e-5)


def test_sgd_gains_one_plus_noise_over_base_in_all():
    assert variance(10**15, base_batch_tokens=8192, noise_scale=40_000) == pytest.approx(1 + 40_000 / 8192, rel=1e-9)


@given(batches, batches)
def test_without_eps_adam_follows_signs_and_with_a_large_one_the_gradient(base, batch):
    settings = {"base_batch_tokens": base, "noise_scale": 40_000.0}
    small = adam_eps(batch, **settings, alignment=2.5, eps_to_gradient=0.0)
    assert small == pytest.approx(sign(batch, **settings, alignment=2.5), rel=1e-12)
    large = adam_eps(batch, **settings, alignment=1.0, eps_to_gradient=1e6)  # what is left is of order x / rho
    assert large == pytest.approx(variance(batch, **settings), rel=1e-6)


@given(batches, st.floats(0, 100))
def test_adam_with_eps_lies_between_its_limits(batch, eps):
    settings = {"base_batch_tokens": 8192, "noise_scale": 40_000.0}
    ends = [sign(batch, **settings, alignment=1.0), variance(batch, **settings)]
    between = adam_eps(batch, **settings, alignment=1.0, eps_to_gradient=eps)
    assert min(ends) * (1 - 1e-9) <= between <= max(ends) * (1 + 1e-9)


@pytest.mark.parametrize("alignment", [2.5, 3.0, 6.0])
def test_signs_have_their_peak_where_the_law_says(alignment):
    peak = 40_000 / (alignment - 2)
    rates = {b: sign(b, base_batch_tokens=8192, noise_scale=40_000, alignment=alignment) for b in range(1000, 100_000)}
    assert max(rates, key=lambda b: rates[b]) == pytest.approx(peak, abs=1)
    assert rates[99_999] < rates[round(peak)]  # beyond it, more batch wants less


@pytest.mark.parametrize("alignment", [0.5, 1.0, 2.0])
def test_without_much_alignment_signs_have_no_peak(alignment):
    rates = [sign(2**n, base_batch_tokens=8192, noise_scale=40_000, alignment=alignment) for n in range(6, 30)]
    assert rates == sorted(rates)


def test_eps_removes_the_peak():
    settings = {"base_batch_tokens": 8192, "noise_scale": 40_000.0, "alignment": 3.0}
    rates = {
        eps: [adam_eps(2**n, **settings, eps_to_gradient=eps) for n in range(6, 34)] for eps in (0.0, math.sqrt(0.5))
    }
    assert rates[0.0] != sorted(rates[0.0])
    assert rates[math.sqrt(0.5)] == sorted(rates[math.sqrt(0.5)])  # q = 2 (1 + eps^2)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("base", [0, -1, None])
def test_a_base_batch_that_is_missing_or_below_one_is_refused_by_name(name, base):
    with pytest.raises(ConfigError, match=rf"scaling\.base_batch_tokens={base}: .* at which optimizer\.lr was tuned"):
        RULES[name](8192, base_batch_tokens=base)


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("scale", [0, -3.0, math.nan, math.inf])
def test_a_noise_scale_that_is_no_positive_number_is_refused_also_at_the_base(name, scale):
    with pytest.raises(ConfigError, match=r"scaling\.noise_scale=.*must be a number above 0; set the tokens"):
        RULES[name](8192, base_batch_tokens=8192, noise_scale=scale)


@pytest.mark.parametrize("name", NOISY)
def test_an_unmeasured_noise_scale_is_refused_except_at_the_base(name):
    assert RULES[name](8192, base_batch_tokens=8192, noise_scale="measured") == 1.0
    with pytest.raises(ConfigError, match=r"scaling\.noise_scale=measured: nothing has measured it"):
        RULES[name](4096, base_batch_tokens=8192, noise_scale="measured")


@pytest.mark.parametrize(("rule", "wrong"), [("sign", {"alignment": 0}), ("adam_eps", {"eps_to_gradient": -1.0})])
def test_the_settings_of_each_law_are_checked(rule, wrong):
    with pytest.raises(ConfigError, match=rf"scaling\.{next(iter(wrong))}="):
        RULES[rule](4096, base_batch_tokens=8192, **wrong)
