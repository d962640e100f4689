"""Processes several tensors at once on the threads of a CPU, because one small operation cannot use all threads."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TypeVar

import torch

T = TypeVar("T")


def side_by_side(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Call `work` on every item without recording gradients, on up to as many threads as torch uses, in any order.

    Each call uses an equal share of torch's threads, so its result does not depend on which other calls are running.
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
        torch.set_num_threads(threads)  # workers set their own numbers, but MKL has only one for the process


@torch.no_grad()
def _each(work: Callable[[T], None], items: list[T]) -> None:
    for item in items:
        work(item)


@cache
def _pool(workers: int, threads_each: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "optimizer", initializer=partial(torch.set_num_threads, threads_each))
