"""Tensors side by side on the threads of a CPU, where the operations on one are too small to be shared out well."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TypeVar

import torch

T = TypeVar("T")


def side_by_side(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Call `work`, which keeps no gradients, on every item: on as many threads as torch may use, in any order.

    Each call has its share of the threads for its own operations, and so gives the same numbers whatever the others do.
    """
    items, threads = list(items), torch.get_num_threads()
    workers = min(threads, len(items))
    if workers < 2:
        _each(work, items)
        return
    pool = _pool(workers, threads // workers)
    try:
        for _ in pool.map(partial(_each, work), [[item] for item in items]):
            pass
    finally:
        torch.set_num_threads(threads)  # a pool's threads state their own number, and MKL has one for all


@torch.no_grad()
def _each(work: Callable[[T], None], items: list[T]) -> None:
    for item in items:
        work(item)


@cache
def _pool(workers: int, threads_each: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "optimizer", initializer=partial(torch.set_num_threads, threads_each))
