"""Ends a process when the process that started it ends, however that happens."""

import contextlib
import ctypes
import os
import signal
import sys

PARENT = "CRUCIBLE_PARENT"
"""Environment variable with the number of the parent process to follow."""
_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """Ask for SIGTERM when the process named by CRUCIBLE_PARENT ends. Do nothing without that variable.

    Child processes do not inherit the request. Each of them follows its own parent.
    """
    named = os.environ.pop(PARENT, None)
    if named is None:
        return
    if os.getppid() != int(named):  # the parent ended before this line ran
        sys.exit(128 + signal.SIGTERM)
    follow(int(named))


def follow(parent: int) -> None:
    """Ask the kernel for SIGTERM when `parent` ends, if it is this process's parent. Only Linux supports this."""
    if os.getppid() != parent or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
