"""Finds a small set of combinations that contains every pair of values of different settings."""

import itertools
from collections.abc import Mapping, Sequence


def every_combination(choices: Mapping[str, Sequence]) -> list[dict]:
    """Return all combinations."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def every_pair(choices: Mapping[str, Sequence]) -> list[dict]:
    """Return combinations that contain each pair of values, chosen greedily by the number of new pairs."""
    rows, left = [], {pair for row in every_combination(choices) for pair in pairs_of(row)}
    while left:
        first = min(left)
        candidates = (row for row in every_combination(choices) if first in pairs_of(row))
        rows.append(max(candidates, key=lambda row: len(left & pairs_of(row))))
        left -= pairs_of(rows[-1])
    return rows


def pairs_of(row: Mapping[str, object]) -> set[tuple]:
    """Return the pairs of values that a combination contains."""
    return set(itertools.combinations([(name, str(value)) for name, value in row.items()], 2))


def name_of(row: Mapping[str, object]) -> str:
    """Return the name of a test for a combination."""
    return "-".join(str(value) for value in row.values())
