"""How much memory does Tiger save by accumulating gradients in its momentum?

    python benchmarks/tiger_memory.py --layers 16 --width 2048

Each side is a process of its own that trains a stack of square layers for a few updates of several micro-batches, from
one seed; the table gives its peak resident memory, minus its memory before it built the model. That both do the same
is tested in tests/optim/test_tiger.py.
"""

import argparse
import multiprocessing
import resource
from typing import Any

import torch
from torch import nn

from llm.optim.param_groups import build_param_groups
from llm.optim.tiger import Tiger

SIDES = ("buffer", "momentum")
MICRO_BATCHES, UPDATES, ROWS = 4, 3, 16


def peak_bytes() -> int:
    """Return the most memory this process has had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(accumulate: str, layers: int, width: int, results: Any) -> None:
    """Train one side and report its memory."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    before = peak_bytes()
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    optimizer = Tiger(
        build_param_groups(model, lr=1e-3, weight_decay=0.01),
        lr=1e-3,
        weight_decay=0.01,
        beta=0.965,
        min_rms=0.0,
        min_rms_ratio=0.0,
        shrink_ratio=None,
        accumulate=accumulate,
        skip_idle_rows=True,
    )
    for _ in range(UPDATES):
        optimizer.zero_grad()
        for _ in range(MICRO_BATCHES):
            x = torch.randn(ROWS, width)
            ((model(x) - x).square().mean() / MICRO_BATCHES).backward()
        optimizer.step()
    results[accumulate] = peak_bytes() - before


def main() -> None:
    """Run both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = context.Manager().dict()
    for side in SIDES:
        process = context.Process(target=train, args=(side, arguments.layers, arguments.width, results))
        process.start()
        process.join()
    weights = arguments.layers * arguments.width**2 * 4
    print(f"weights {weights / 2**20:.0f} MiB, {MICRO_BATCHES} micro-batches per update")
    for side in SIDES:
        peak = results[side]
        print(f"accumulate={side:10}{peak / 2**20:8.0f} MiB at the peak, {peak / weights:.2f} x the weights")


if __name__ == "__main__":
    main()
