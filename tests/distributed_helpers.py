"""Measures the distance between two runs, for tests with several ranks."""

import json

from safetensors.torch import load_file


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows}


def weights(folder):
    return load_file(folder / "checkpoints/last/model.safetensors")


def distance(one, other):
    """Return the largest difference of a loss and of a weight."""
    a, b = losses(one), losses(other)
    assert a.keys() == b.keys()
    x, y = weights(one), weights(other)
    assert x.keys() == y.keys()
    return max(abs(a[s] - b[s]) for s in a), max(float((x[n] - y[n]).abs().max()) for n in x)
