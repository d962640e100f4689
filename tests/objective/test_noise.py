"""Noise is a function of (seed, stream, step, row, column) with the statistics of independent uniform numbers."""

import math

import pytest
import torch

from llm.ops.noise import GOLDEN, LEVELS, MASKS, KeyedNoise, mix

MASK = (1 << 64) - 1


def noise(seed=0, step=0, rows=64):
    return KeyedNoise(seed, step, torch.arange(rows))


def mixed(value):
    """SplitMix64's finaliser in plain integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def test_it_equals_the_formula_in_plain_integers():
    key = 0
    for part in (7, MASKS, 11):
        key = mixed((key + GOLDEN + part) & MASK)
    expected = [
        [(mixed((mixed((key + GOLDEN * (r + 1)) & MASK) + GOLDEN * (c + 1)) & MASK) >> 11) * 2.0**-53 for c in range(5)]
        for r in range(3)
    ]
    assert noise(7, 11, 3).uniform(5, stream=MASKS).tolist() == expected
    assert mix(torch.tensor([1])).item() % (1 << 64) == mixed(1)


def test_any_split_of_the_rows_gives_the_same_bits_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    whole = noise()
    parts = [whole._replace(rows=rows) for rows in whole.rows.split(7)]
    for draw in (lambda n: n.uniform(9, stream=MASKS), lambda n: n.levels(), lambda n: n.normal(4, 3)):
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts]))
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_are_uniform():
    drawn = noise(rows=256).uniform(256, stream=MASKS).flatten().sort().values
    distance = (drawn - (torch.arange(len(drawn)) + 0.5) / len(drawn)).abs().max()
    assert distance * math.sqrt(len(drawn)) < 1.63  # Kolmogorov-Smirnov at 1 %


@pytest.mark.parametrize(
    "other",
    [
        lambda: noise().uniform(257, stream=MASKS)[:, 1:],
        lambda: KeyedNoise(0, 0, torch.arange(1, 65)).uniform(256, stream=MASKS),
        lambda: noise(step=1).uniform(256, stream=MASKS),
        lambda: noise(seed=1).uniform(256, stream=MASKS),
        lambda: noise().uniform(256, stream=LEVELS),
    ],
    ids=["column", "row", "step", "seed", "stream"],
)
def test_neighbours_are_uncorrelated(other):
    pair = torch.stack([noise().uniform(256, stream=MASKS).flatten(), other().flatten()])
    assert torch.corrcoef(pair)[0, 1].abs() * math.sqrt(pair.shape[1]) < 3.3  # standard deviations


def test_levels_of_consecutive_rows_are_spread_evenly():
    spread = []
    for step in range(200):
        levels = noise(step=step, rows=16).levels()
        spread.append(torch.cos(2 * math.pi * levels).mean())
        assert ((levels >= 0) & (levels < 1)).all()
    # the mean over 16 independent levels has a standard deviation of 0.177
    assert torch.stack(spread).std() < 0.09
    first = torch.tensor([noise(step=step, rows=1).levels().item() for step in range(400)])
    assert first.mean() == pytest.approx(0.5, abs=0.05)
