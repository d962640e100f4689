"""Opens the standard streams that the caller has closed."""

import os
import sys


def open_closed_streams() -> None:
    """Open descriptors 0, 1 and 2 on the null device where they are closed (`>&-`; some schedulers do so).

    Python sets the streams of closed descriptors to None. The next file that is opened would take the number of the
    closed descriptor, and whatever a library prints would be written into it. Call this before any file is opened.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))
