"""Computes which window is the n-th of a run, as a pure function of (seed, n) for any number of ranks and workers.

Each epoch visits every window once, in an order of its own. The order is a keyed bijection and nothing is stored, so a
run that resumes at any step knows its next window at once.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from llm.errors import ConfigError

_ROUNDS = 6  # four make a Feistel network a strong pseudo-random permutation; small halves need more
_MASK = (1 << 64) - 1


def permute(indices: np.ndarray, *, size: int, key: int) -> np.ndarray:
    """Map each index in 0..size-1 to another by a bijection that `key` selects.

    A balanced Feistel network permutes 0..4^h-1 >= size. An image outside 0..size-1 is mapped again until it falls
    inside (cycle walking), fewer than four times on average.

    Args:
        indices: integers in [0, size).
        size: number of windows, at least 1.
        key: any integer, of which the lowest 64 bits are used.

    Source: Luby and Rackoff 1988, "How to construct pseudorandom permutations"; cycle walking: Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains", section 3. Round function: SplitMix64's finaliser (Steele et al. 2014).
    """
    half = max((int(size - 1).bit_length() + 1) // 2, 1)
    round_keys = [np.uint64(_mix_int(key + i * 0x9E3779B97F4A7C15)) for i in range(1, _ROUNDS + 1)]
    values = np.asarray(indices).astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, round_keys)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half: int, round_keys: list[np.uint64]) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix_int(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


Span = tuple[int, int]
"""Window numbers start..stop-1 of a run."""


def united(spans: Iterable[Span]) -> list[Span]:
    """Return the same numbers as ascending spans that do not touch, without empty ones."""
    whole: list[Span] = []
    for start, stop in sorted((start, stop) for start, stop in spans if start < stop):
        if whole and start <= whole[-1][1]:
            whole[-1] = (whole[-1][0], max(stop, whole[-1][1]))
        else:
            whole.append((start, stop))
    return whole


def numbers_at(places: np.ndarray, left_out: Sequence[Span]) -> np.ndarray:
    """Return the window numbers at these places of a run after the spans, as `united` returns them, are excluded."""
    numbers = np.asarray(places).astype(np.int64)
    for start, stop in left_out:
        numbers[numbers >= start] += stop - start
    return numbers


def run_windows(start: int, stop: int, *, num_windows: int, seed: int, left_out: Sequence[Span] = ()) -> np.ndarray:
    """Return the corpus windows at places start..stop-1 of the run, after some window numbers are excluded."""
    numbers = numbers_at(np.arange(start, stop), left_out)
    result = np.empty_like(numbers)
    for epoch in np.unique(numbers // num_windows).tolist():
        inside = numbers // num_windows == epoch
        key = _mix_int(_mix_int(seed) + epoch)
        result[inside] = permute(numbers[inside] % num_windows, size=num_windows, key=key)
    return result


class RunSampler:
    """A sampler that yields one rank's micro-batches of window numbers, from any step on.

    Row i of micro-step a of step s on rank r of R is window `s * W + (a * R + r) * b + i` of the run, where
    W = windows_per_step and b = micro_batch_size. A step always reads the same W windows, whatever R and b are.

    Args:
        num_windows: number of windows in the corpus, at least 1.
        seed: selects the order.
        windows_per_step: batch_tokens // context_length.
        micro_batch_size: windows per micro-batch of a rank.
        rank, world_size: number of this process, and of the processes that share each step.
        total_steps: steps of the whole run; the length counts all their micro-batches.
        start_step: returns the number of finished steps when iteration begins.
        span_of_step: `f(step) -> (first window of the run, windows)` where steps differ in size; the number of
            micro-batches then stays the same and their size changes. None for windows_per_step in each step.
        left_out: window numbers of the run that are excluded; the next ones take their places.

    Raises:
        ConfigError: windows_per_step does not divide into micro-batches over the ranks.
    """

    def __init__(
        self,
        *,
        num_windows: int,
        seed: int,
        windows_per_step: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        total_steps: int,
        start_step: Callable[[], int],
        span_of_step: Callable[[int], tuple[int, int]] | None = None,
        left_out: Sequence[Span] = (),
    ):
        if windows_per_step % (micro_batch_size * world_size) or not windows_per_step:
            raise ConfigError(
                f"micro_batch_size={micro_batch_size}: {world_size} devices with {micro_batch_size} windows each must "
                f"divide the {windows_per_step} windows of a step (batch_tokens // context_length); change one of them"
            )
        self.num_windows = num_windows
        self.seed = seed
        self.windows_per_step = windows_per_step
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.total_steps = total_steps
        self.start_step, self.left_out = start_step, left_out
        self.span_of_step = span_of_step or (lambda step: (step * windows_per_step, windows_per_step))

    @property
    def accumulation(self) -> int:
        """Micro-batches per step on each rank."""
        return self.windows_per_step // (self.micro_batch_size * self.world_size)

    def __len__(self) -> int:
        return self.total_steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step, micro_step in itertools.product(range(self.start_step(), self.total_steps), range(self.accumulation)):
            start, windows = self.span_of_step(step)
            rows = windows // (self.accumulation * self.world_size)
            first = start + (micro_step * self.world_size + self.rank) * rows
            order = {"num_windows": self.num_windows, "seed": self.seed, "left_out": self.left_out}
            yield run_windows(first, first + rows, **order).tolist()


def validation_windows(*, num_windows: int, limit: int, rank: int, world_size: int) -> np.ndarray:
    """Return one rank's share of the fixed validation windows: evenly spread, in order, the same number on every rank.

    The count is a multiple of 8 where there are at least 8, so 1, 2, 4 or 8 ranks together read the same windows.

    Args:
        num_windows: number of windows in the validation split.
        limit: largest number of windows, over all ranks.
    """
    count = min(num_windows, limit)
    count -= count % 8 if count >= 8 else 0
    count -= count % world_size
    chosen = np.arange(count, dtype=np.int64) * num_windows // max(count, 1)
    return chosen[rank::world_size]
