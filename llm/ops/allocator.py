"""Settings of the C library's memory allocator for training on a CPU."""

import contextlib
import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of two settings in glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory instead of returning it to the kernel; return whether it does.

    By default glibc maps blocks of 32 MiB and more anew each time, and the kernel clears them page by page. That takes
    a tenth of a training step, and a third of an attention with large intermediate tensors. Each step needs the same
    blocks again, so peak memory stays the same, but the process does not shrink after training. Other C libraries are
    left unchanged.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
    return False
