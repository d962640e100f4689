"""How the C library hands out memory while a model trains on a CPU."""

import contextlib
import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names of settings in glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed instead of giving it back to the kernel; say whether it does.

    Blocks of 32 MiB and more are otherwise mapped anew each time, and the kernel clears them page by page: a tenth of a
    training step, a third of an attention with large intermediate tensors. Each step needs the same blocks again, so
    the peak stays what it was; a process that has trained does not shrink. With another C library nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
    return False
