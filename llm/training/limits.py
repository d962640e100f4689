"""Checks the limits of the operating system that data workers need: open files and shared memory."""

import errno
import os
import resource
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llm.errors import ConfigError, LimitError

FILES_PER_WORKER = 16
"""Files that the training process opens per data worker: 9 were counted."""
FILES_OF_A_PROCESS = 80
"""Files that a process with data workers has open: a worker had up to 71 while it imported its modules."""
SPARE_FILES = 10
"""Files that a process must still be able to open."""

SHARED_MEMORY = Path("/dev/shm")
MORE_SHARED_MEMORY = "remove files there, enlarge it (docker run --shm-size=1g), or set loader.num_workers=0"
PREFETCHED_BATCHES = 2
"""Micro-batches that each worker prepares ahead, torch's default."""
BYTES_PER_TOKEN = 32
"""Four tensors of 8 bytes per token; see `Batch`."""


def check_open_files(num_workers: int) -> None:
    """Raise the limit of open files as far as data workers need it.

    Raises:
        ConfigError: the hard limit is too low.
    """
    if not num_workers:
        return
    needed = FILES_OF_A_PROCESS + FILES_PER_WORKER * num_workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard == resource.RLIM_INFINITY or hard >= needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return
    raise ConfigError(
        f"loader.num_workers={num_workers}: needs about {needed} open files, and the limit is {hard} (`ulimit -n` "
        f"shows it); raise it with `ulimit -n {max(1024, needed)}`, or set loader.num_workers=0"
    )


def check_shared_memory(num_workers: int, *, micro_batch_tokens: int) -> None:
    """Raise ConfigError where /dev/shm has no room for the micro-batches that data workers prepare."""
    if not num_workers or not SHARED_MEMORY.is_dir():
        return
    needed = num_workers * PREFETCHED_BATCHES * micro_batch_tokens * BYTES_PER_TOKEN
    if (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        raise ConfigError(
            f"loader.num_workers={num_workers}: workers pass batches through {SHARED_MEMORY}, which has {free} bytes "
            f"free of {needed} needed; {MORE_SHARED_MEMORY}"
        )


def limit_error(error: Exception, *, killed_workers: Sequence[str], micro_batch_tokens: int) -> LimitError | None:
    """Return one line for an error whose cause is a limit or a killed data worker; None for any other.

    Args:
        error: the error that ended training.
        killed_workers: names of the signals that ended data workers.
        micro_batch_tokens: tokens of a micro-batch.
    """
    if (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)) or _files_are_exhausted():
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return LimitError(
            f"open files: the limit of {limit} is reached (`ulimit -n` shows it); raise it with `ulimit -n "
            f"{max(1024, 4 * limit)}` and resume, or set loader.num_workers=0"
        )
    if "SIGBUS" in killed_workers:
        free = shutil.disk_usage(SHARED_MEMORY).free
        return LimitError(
            f"{SHARED_MEMORY}: full, with {free} bytes free: a data worker was ended by SIGBUS while it wrote a batch "
            f"of {micro_batch_tokens * BYTES_PER_TOKEN} bytes there; {MORE_SHARED_MEMORY}"
        )
    if killed_workers:
        return LimitError(
            f"loader.num_workers: a data worker was ended by {killed_workers[0]} from outside; the kernel does so when "
            "memory runs out; resume, with fewer loader.num_workers if it happens again"
        )
    return None


def _files_are_exhausted() -> bool:
    """Return whether this process cannot open SPARE_FILES more files."""
    opened: list[int] = []
    try:
        opened.extend(os.open(tempfile.gettempdir(), os.O_RDONLY) for _ in range(SPARE_FILES))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return False
