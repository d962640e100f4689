"""Defines the data loader of windows, which knows the processes of its workers."""

import signal
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from data.windows import WindowDataset
from llm.contracts import Batch


class WindowLoader(DataLoader):
    """A DataLoader that keeps its workers' processes, so that the cause of their end can be reported.

    The dataset returns whole batches, so nothing is collated.
    """

    workers: tuple[Any, ...] = ()

    def __init__(self, dataset: WindowDataset, **settings: Any):
        super().__init__(
            dataset,
            collate_fn=_keep,
            worker_init_fn=ignore_stop_signals,
            pin_memory=torch.cuda.is_available(),
            **settings,
        )

    def __iter__(self) -> Any:
        batches = super().__iter__()
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            self.workers = tuple(batches._workers)
        return batches

    def killed_workers(self) -> list[str]:
        """Return the names of the signals that ended workers."""
        codes = [worker.exitcode for worker in self.workers]
        return [signal.Signals(-code).name for code in codes if code is not None and code < 0]


def _keep(batch: Any) -> Batch:
    return batch


def ignore_stop_signals(_: int) -> None:
    """Ignore the signals that stop a run: the main process saves a checkpoint first and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
