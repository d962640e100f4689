import math
from functools import partial

import pytest
import torch
from catalogue import options
from hypothesis import given
from hypothesis import strategies as st

from llm.config.build import build_scaling, module_factories, retuned_optimizer
from llm.config.pieces import instantiate
from llm.config.sizes import batch_ramp
from llm.errors import ConfigError
from llm.optim.lion import Lion
from llm.optim.muon import Muon
from llm.optim.sgd import SGD
from llm.optim.tiger import Tiger
from llm.scaling.momentum import equivalent_momentum
from llm.scaling.rules import adam, adam_eps, linear, noise_share, none, sign, sqrt, variance

RULES = {
    "none": none,
    "linear": linear,
    "sqrt": sqrt,
    "variance": partial(variance, noise_scale=40_000),
    "sign": partial(sign, noise_scale=40_000, alignment=1.0),
    "adam": partial(adam, noise_scale=40_000, alignment=1.0, momentum=0.9),
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


def test_without_momentum_the_laws_are_the_former_ones_bit_for_bit():
    base, batch, scale = 8192, 3000, 40_000.0
    few, many = scale / batch, scale / batch * (batch / base)
    settings = {"base_batch_tokens": base, "noise_scale": scale}
    assert variance(batch, **settings) == (1 / (1 + few)) / (1 / (1 + many))
    former = [math.sqrt(1 + x) / (3.0 + x) for x in (few, many)]
    assert sign(batch, **settings, alignment=3.0) == former[0] / former[1]
    assert adam(batch, **settings, alignment=3.0) == pytest.approx(former[0] / former[1], rel=1e-15)


def test_the_laws_with_momentum_have_the_limits_of_the_derivation():
    share, scale = noise_share(0.9), 1e6
    few, most, noisy = 1, 10**15, {"base_batch_tokens": 10**15, "noise_scale": scale, "momentum": 0.9}
    x = scale / few
    assert most > 1e8 * scale  # where x is nearly 0 and each law is 1 / q
    assert variance(few, **noisy) == pytest.approx(1 / (share * x), rel=1e-3)
    assert sign(few, **noisy, alignment=1.0) == pytest.approx(1 / math.sqrt(share * x), rel=1e-3)
    assert adam(few, **noisy, alignment=1.0) == pytest.approx(1 / (share * math.sqrt(x)), rel=1e-3)


@pytest.mark.parametrize(("momentum", "alignment"), [(0.9, 1.0), (0.95, 1.0), (0.5, 1.0), (0.9, 3.0)])
def test_adam_has_its_peak_where_the_law_says(momentum, alignment):
    share, scale = noise_share(momentum), 1_000_000
    peak = scale * share / (alignment - 2 * share)
    if alignment == 1:
        assert peak == pytest.approx(scale * (1 - momentum) / (3 * momentum - 1), rel=1e-12)
    grid = [round(peak * 1.0002**n) for n in range(-2000, 2001)]
    settings = {"base_batch_tokens": 8192, "noise_scale": scale, "alignment": alignment, "momentum": momentum}
    assert max(grid, key=lambda b: adam(b, **settings)) == pytest.approx(peak, rel=1e-3)


def test_ten_times_the_batch_beyond_the_peak_wants_a_lower_rate():
    """Monte Carlo of the best rate at x = 10 and at x = 1 gave 2.273/1.638 and the former law rises 2.3 times."""
    settings = {"base_batch_tokens": 1000, "noise_scale": 10_000, "alignment": 1.0}
    assert adam(10_000, **settings, momentum=0.9) == pytest.approx(0.62, abs=0.02)
    assert sign(10_000, **settings) == pytest.approx(2.35, abs=0.01)


@pytest.mark.parametrize(
    ("optimizer", "settings", "averaged"),
    [
        (Lion, {"betas": [0.95, 0.98]}, 86.1),
        (Tiger, {"beta": 0.965}, 56.1),
        (Muon, {"momentum": 0.95, "nesterov": True}, 32.9),
        (Muon, {"momentum": 0.95, "nesterov": False}, 39.0),
        (SGD, {"momentum": 0.9}, 19.0),
        (torch.optim.AdamW, {"betas": [0.9, 0.95]}, 19.0),
        (torch.optim.SGD, {}, 1.0),
    ],
)
def test_momentum_divides_the_noise_by_the_number_of_batches_that_it_averages(optimizer, settings, averaged):
    assert 1 / noise_share(equivalent_momentum(optimizer, settings)) == pytest.approx(averaged, abs=0.05)


def test_the_weights_of_lion_and_nesterov_are_those_of_the_recursion():
    """Feed one gradient at time 0 through the recursions, and read its weight in each later step."""
    for optimizer, settings in ((Lion, {"betas": [0.9, 0.99]}), (Muon, {"momentum": 0.95, "nesterov": True})):
        first, second = settings.get("betas", [0.95, 0.95])
        momentum, seen = 0.0, []
        for step in range(2000):
            gradient = float(step == 0)
            if optimizer is Muon:
                momentum = first * momentum + (1 - first) * gradient
                seen.append(first * momentum + (1 - first) * gradient)
            else:
                seen.append(first * momentum + (1 - first) * gradient)
                momentum = second * momentum + (1 - second) * gradient
        share = sum(weight**2 for weight in seen)
        assert sum(seen) == pytest.approx(1.0, abs=1e-6)
        assert noise_share(equivalent_momentum(optimizer, settings)) == pytest.approx(share, rel=1e-9)


def test_auto_takes_the_momentum_of_the_optimizer_in_use(composed):
    cfg = composed("optimizer=lion", "scaling=sign", "scaling.noise_scale=40000", "batch_tokens=65536")
    own = equivalent_momentum(Lion, {"betas": cfg["optimizer"]["betas"]})
    assert build_scaling(cfg)(65536) == sign(
        65536, base_batch_tokens=8192, noise_scale=40000, alignment=1.0, momentum=own
    )
    expected = adam(65536, base_batch_tokens=8192, noise_scale=4e4, alignment=1.0, momentum=0.9)
    adamw = composed("scaling=adam", "scaling.noise_scale=4e4", "batch_tokens=65536")
    assert build_scaling(adamw)(65536) == pytest.approx(expected, rel=1e-12)


def test_half_lives_that_are_kept_give_each_batch_its_own_momentum(composed):
    cfg = composed("scaling=adam", "scaling.noise_scale=4e4", "batch_tokens=32768", "keep_half_life=true")
    expected = adam(32768, base_batch_tokens=8192, noise_scale=4e4, alignment=1.0, momentum=[0.9**4, 0.9])
    assert build_scaling(cfg)(32768) == pytest.approx(expected, rel=1e-12)
    factories = module_factories(cfg, batch_ramp(cfg), optimizer=retuned_optimizer(cfg)[0])
    assert factories["scaling"](32768) == pytest.approx(expected, rel=1e-12)  # not of the adjusted beta once more


@pytest.mark.parametrize("momentum", [1.0, -0.1, [0.9], [0.9, 2.0]])
def test_a_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ConfigError, match=r"scaling\.momentum=.*must be a decay rate"):
        adam(4096, base_batch_tokens=8192, noise_scale=1e4, alignment=1.0, momentum=momentum)


def test_the_momentum_of_an_unknown_optimizer_must_be_set():
    with pytest.raises(ConfigError, match=r"scaling\.momentum=auto: the momentum of Adagrad is unknown"):
        equivalent_momentum(torch.optim.Adagrad, {})
