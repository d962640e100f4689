import math

import pytest
import torch

from llm.errors import ConfigError
from llm.scaling.noise_estimate import SmoothedNoiseScale, two_batch_estimate

SIGNAL, TRACE = 1.0, 500.0


def draws(*, small, parts, dim=400, repeats=4000, seed=0):
    """Squared norms of the gradients of `parts` batches of `small`, averaged, and of their mean: (repeats, 2)."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.full((dim,), math.sqrt(SIGNAL / dim))
    sigma = math.sqrt(TRACE / dim / small)
    squares = torch.zeros(repeats)
    total = torch.zeros(repeats, dim)
    for _ in range(parts):
        gradient = mean + sigma * torch.randn(repeats, dim, generator=generator)
        squares += gradient.square().sum(1) / parts
        total += gradient / parts
    return torch.stack([squares, total.square().sum(1)], dim=1)


@pytest.mark.parametrize(("small", "parts"), [(16, 8), (4, 2), (4, 8)])
def test_both_estimates_are_unbiased_on_a_gaussian_toy(small, parts):
    estimates = torch.tensor(
        [two_batch_estimate(s, b, small=small, big=small * parts) for s, b in draws(small=small, parts=parts).tolist()]
    )
    means, errors = estimates.mean(0), estimates.std(0) / len(estimates) ** 0.5
    print(f"({small}, {small * parts}):", *(f"{m:.3f} ± {e:.3f}" for m, e in zip(means, errors, strict=True)))
    for mean, error, true in zip(means.tolist(), errors.tolist(), (SIGNAL, TRACE), strict=True):
        assert abs(mean - true) < 4 * error  # once in 16 000 seeds otherwise
        assert error < 0.15 * true  # and the test can tell: sizes (4, 8) give 10 % for |g|², the others less


def test_dividing_averages_finds_the_noise_scale_where_averaging_ratios_does_not():
    smoothed, ratios = SmoothedNoiseScale(decay=0.999), []
    for s, b in draws(small=4, parts=2, repeats=20_000, dim=100).tolist():
        signal, trace = two_batch_estimate(s, b, small=4, big=8)
        smoothed.update("all", signal=signal, trace=trace)
        ratios.append(trace / signal)
    # the average looks back over 2000 draws, each with a relative error of 10 in |g|²: 22 % would be one deviation
    assert smoothed.value("all") == pytest.approx(TRACE / SIGNAL, rel=0.6)
    assert min(ratios) < 0 < max(ratios)  # of single draws, many are not even positive


def test_the_smoothed_value_equals_the_ratio_of_two_exponential_averages():
    smoothed, signals, traces = SmoothedNoiseScale(decay=0.5), [1.0, 3.0, 2.0], [10.0, 10.0, 40.0]
    for signal, trace in zip(signals, traces, strict=True):
        smoothed.update("matrix", signal=signal, trace=trace)
    weights = [0.125, 0.25, 0.5]
    expected = sum(w * t for w, t in zip(weights, traces, strict=True)) / sum(
        w * s for w, s in zip(weights, signals, strict=True)
    )
    assert smoothed.value("matrix") == pytest.approx(expected, rel=1e-12)
    assert smoothed.value("head") is None


def test_an_average_that_is_not_positive_gives_no_noise_scale():
    smoothed = SmoothedNoiseScale(decay=0.9)
    smoothed.update("all", signal=-1.0, trace=5.0)
    assert smoothed.value("all") is None


def test_a_single_batch_is_refused_with_the_setting_to_change():
    with pytest.raises(ConfigError, match=r"micro_batch_size: .* at least two micro-batches"):
        two_batch_estimate(1.0, 1.0, small=64, big=64)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ConfigError, match=r"callbacks\.noise_scale\.decay="):
        SmoothedNoiseScale(decay=decay)
