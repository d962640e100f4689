"""A process that ends with the one that started it, however that one ends."""

import contextlib
import ctypes
import os
import signal
import sys

PARENT = "CRUCIBLE_PARENT"
"""Environment variable that names the process to follow."""
_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """Ask for SIGTERM when the process named by CRUCIBLE_PARENT dies; without that variable nothing happens.

    Processes that this one starts do not inherit the request: each follows its own parent.
    """
    named = os.environ.pop(PARENT, None)
    if named is None:
        return
    if os.getppid() != int(named):  # it died before this line was reached
        sys.exit(128 + signal.SIGTERM)
    follow(int(named))


def follow(parent: int) -> None:
    """Ask the kernel for SIGTERM when `parent` dies, if it is this process's parent; Linux only, elsewhere nothing."""
    if os.getppid() != parent or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
