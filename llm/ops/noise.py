"""Draws noise as a pure function of seed, stream, step, row and column, so that nothing has to be stored."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
"""Increment of SplitMix64: 2^64 divided by the golden ratio, made odd."""

LEVELS, MASKS, REPLACEMENTS, DECODING, GAUSSIAN = range(5)
"""Streams: independent numbers for levels, masked places, replacement tokens, decoding and Gaussian noise."""

GOLDEN_STEP = 0.6180339887
"""Fractional part of the golden ratio: its multiples modulo 1 fill [0, 1) evenly, however many there are."""


def wrapped(value: int) -> int:
    """Return the signed 64-bit integer with the lowest 64 bits of `value`."""
    return ((value + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def mix(values: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Map 64-bit integers to 64-bit integers that look random; a bijection.

    torch shifts arithmetically, so the copies of the sign are masked.

    Source: SplitMix64's finaliser (Steele et al. 2014).
    """
    values = (values ^ ((values >> 30) & ((1 << 34) - 1))) * wrapped(0xBF58476D1CE4E5B9)
    values = (values ^ ((values >> 27) & ((1 << 37) - 1))) * wrapped(0x94D049BB133111EB)
    return values ^ ((values >> 31) & ((1 << 33) - 1))


class KeyedNoise(NamedTuple):
    """The noise of a micro-batch: every draw is a function of seed, step and row, and of nothing else.

        k = 0;  for part in (seed, stream, step):  k = mix(k + G + part)
        u[row, column] = (mix(mix(k + G (row + 1)) + G (column + 1)) >> 11) · 2⁻⁵³

    Micro-batches, ranks, workers and resumed runs therefore draw the same numbers for the same row.
    """

    seed: int
    step: int
    rows: Int[Tensor, " batch"]

    def row_keys(self, stream: int) -> Int[Tensor, " batch"]:
        """Return the key of each row."""
        key = torch.zeros((), dtype=torch.long)
        for part in (self.seed, stream, self.step):
            key = mix(key + wrapped(GOLDEN + part))
        return mix(key.to(self.rows.device) + wrapped(GOLDEN) * (self.rows + 1))

    def uniform(self, columns: int, *, stream: int) -> Float[Tensor, "batch {columns}"]:
        """Return numbers in [0, 1) in fp64; each stream has its own."""
        steps = wrapped(GOLDEN) * torch.arange(1, columns + 1, device=self.rows.device)
        return _unit(mix(self.row_keys(stream)[:, None] + steps))

    def levels(self, per_row: int = 1) -> Float[Tensor, "batch {per_row}"]:
        """Return levels in [0, 1), evenly spread over consecutive ones and over rows, in fp64.

            τ_n = frac(u + n · 0.6180339887),   n = row · per_row + column

        One uniform number per step shifts a golden-ratio sequence, so each level is uniform.
        """
        first = self._replace(rows=torch.zeros(1, dtype=torch.long, device=self.rows.device))
        columns = torch.arange(per_row, device=self.rows.device)
        numbers = self.rows[:, None] * per_row + columns
        return (first.uniform(1, stream=LEVELS) + numbers.double() * GOLDEN_STEP) % 1.0

    def normal(self, *shape: int) -> Float[Tensor, "batch ..."]:
        """Return standard normal numbers in fp32; kinds of devices agree up to rounding.

            r = √(−2 log(1 − u)),   r cos 2πv and r sin 2πv of two uniform numbers u and v

        Source: Box and Muller (1958).
        """
        count = math.prod(shape)
        half = (count + 1) // 2
        first, second = self.uniform(2 * half, stream=GAUSSIAN).split(half, 1)
        radius, angle = (-2 * torch.log1p(-first)).sqrt(), 2 * math.pi * second
        drawn = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]
        return drawn.float().view(len(self.rows), *shape)


def _unit(values: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the upper 53 bits as numbers in [0, 1)."""
    return ((values >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
