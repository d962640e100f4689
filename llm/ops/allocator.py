"""Settings of the C library's memory allocator for training on a CPU."""

import contextlib
import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of two settings in glibc's malloc.h."""

DEFAULT_TRIM_THRESHOLD, DEFAULT_MMAP_MAX = 128 * 1024, 65536
"""Values of the two settings in a process that has not changed them."""


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory instead of returning it to the kernel; return whether it does.

    By default glibc maps blocks of 32 MiB and more anew each time, and the kernel clears them page by page. That takes
    a tenth of a training step, and a third of an attention with large intermediate tensors. Each step needs the same
    blocks again, so peak memory stays the same, but the process does not shrink after training. Other C libraries are
    left unchanged.
    """
    return _set_thresholds(trim_threshold=-1, mmap_max=0)


def return_freed_memory() -> bool:
    """Undo `keep_freed_memory` and return freed memory to the kernel; return whether the C library does so."""
    if not _set_thresholds(trim_threshold=DEFAULT_TRIM_THRESHOLD, mmap_max=DEFAULT_MMAP_MAX):
        return False
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return True


def _set_thresholds(*, trim_threshold: int, mmap_max: int) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return bool(mallopt(M_MMAP_MAX, mmap_max)) and bool(mallopt(M_TRIM_THRESHOLD, trim_threshold))
    return False
