"""A data loader that knows the processes of its workers."""

import signal
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter


class WindowLoader(DataLoader):
    """A DataLoader that keeps its workers' processes, so that the cause of their end can be reported."""

    workers: tuple[Any, ...] = ()

    def __iter__(self) -> Any:
        batches = super().__iter__()
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            self.workers = tuple(batches._workers)
        return batches

    def killed_workers(self) -> list[str]:
        """Return the names of the signals that ended workers."""
        codes = [worker.exitcode for worker in self.workers]
        return [signal.Signals(-code).name for code in codes if code is not None and code < 0]
