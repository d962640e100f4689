"""How does the time of the gated delta rule grow with the context, beside its slow form and torch's attention?

    OMP_NUM_THREADS=1 python benchmarks/delta_attention.py --lengths 1024 2048 4096 8192 --rounds 3

One pass runs forward and backward of a side at one length: 4 heads of 64, one row, fp32. `loop` is the definition token
by token. The loop and SDPA stop at --longest. Times are medians over rounds, after one pass that is not timed. The
exponent is the slope of log time over log length by least squares.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.model.attention.delta_chunks import chunked_delta, recurrent_delta

HEADS, HEAD_DIM = 4, 64


def draw(length: int, features: int) -> list[Tensor]:
    """Return queries, keys, values, writing strengths and log gates."""
    q, k, v = torch.randn(3, 1, length, HEADS, HEAD_DIM)
    gate = -F.softplus(torch.randn(1, length, HEADS, features) - 3).clamp_max(5)
    tensors = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, torch.rand(1, length, HEADS), gate]
    return [tensor.requires_grad_() for tensor in tensors]


def delta_rule(features: int, *, chunk_size: int | None) -> Callable[[int], Callable[[], Tensor]]:
    """Return a side: the rule with gates per head (1) or channel; chunk_size None is the loop over tokens."""

    def prepare(length: int) -> Callable[[], Tensor]:
        tensors = draw(length, features)
        ids = torch.zeros(1, length, dtype=torch.long)
        keys = {"document_ids": ids, "initial": torch.zeros(1, HEADS, HEAD_DIM, HEAD_DIM), "before": ids[:, 0]}
        if chunk_size is None:
            return lambda: recurrent_delta(*tensors, **keys)[0]
        return lambda: chunked_delta(*tensors, **keys, chunk_size=chunk_size)[0]

    return prepare


def torch_attention(length: int) -> Callable[[], Tensor]:
    """Return torch's softmax attention on the same queries, keys and values."""
    q, k, v = (x.transpose(1, 2) for x in draw(length, 1)[:3])
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)


SIDES = {
    "delta, head gate, chunks of 64": delta_rule(1, chunk_size=64),
    "delta, head gate, chunks of 32": delta_rule(1, chunk_size=32),
    "delta, channel gate, chunks of 64": delta_rule(HEAD_DIM, chunk_size=64),
    "delta, head gate, loop": delta_rule(1, chunk_size=None),
    "SDPA": torch_attention,
}
LIMITED = ("SDPA", "delta, head gate, loop")


def seconds(run: Callable[[], Tensor]) -> float:
    """Return the time of one forward and backward pass."""
    start = time.perf_counter()
    run().sum().backward()
    return time.perf_counter() - start


def exponent(lengths: Sequence[int], times: Sequence[float]) -> float:
    """Return the slope of log time over log length by least squares."""
    x, y = [math.log(length) for length in lengths], [math.log(value) for value in times]
    center = statistics.mean(x)
    return sum((a - center) * b for a, b in zip(x, y, strict=True)) / sum((a - center) ** 2 for a in x)


def main() -> None:
    """Print a table of times per side and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--longest", type=int, default=4096, help="largest length of the loop and of SDPA")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for name, prepare in SIDES.items():
        lengths = [n for n in arguments.lengths if name not in LIMITED or n <= arguments.longest]
        times = []
        for length in lengths:
            run = prepare(length)
            seconds(run)
            times.append(statistics.median(seconds(run) for _ in range(arguments.rounds)))
        cells = ", ".join(f"{n}: {1e3 * t:.0f} ms" for n, t in zip(lengths, times, strict=True))
        slope = f"{exponent(lengths, times):.2f}" if len(lengths) > 1 else "-"
        print(f"{name}: {cells}; exponent {slope}", flush=True)


if __name__ == "__main__":
    main()
