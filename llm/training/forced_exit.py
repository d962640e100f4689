"""Ends a run whose clean stop hangs: at a second signal, and at the end of the process."""

import atexit
import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Iterator

from llm.distributed.launch import SAME_SIGNAL_SECONDS, STOPPING

GRACE_SECONDS = 5.0
"""Seconds after a second signal in which a run may still end cleanly."""


@contextlib.contextmanager
def ended_by_second_signal(*, grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """End the process within `grace_seconds` of a second stop signal, whatever the main thread does.

    Python runs signal handlers in the main thread alone, and only between two of its instructions. A thread therefore
    reads the signals from the descriptor that Python's own handler in C writes to.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader, grace_seconds), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)


def _watch(reader: int, grace_seconds: float) -> None:
    """Read signal numbers until a 0; exit the process `grace_seconds` after the second stop signal."""
    first, deadline, last = None, None, signal.SIGTERM
    while True:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reader], [], [], timeout)[0]:
            _leave(last)
        for number in os.read(reader, 64):
            if number == 0:
                return
            if number not in STOPPING:
                continue
            now = time.monotonic()
            first = now if first is None else first
            if now - first > SAME_SIGNAL_SECONDS and deadline is None:
                deadline, last = now + grace_seconds, signal.Signals(number)


def _leave(number: signal.Signals) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\n{number.name}: the run did not end in time; its processes are killed\n".encode())
    _kill_workers()
    os._exit(128 + number)


def kill_workers_at_exit() -> None:
    """Kill data workers that still run when the process ends; Python would wait for them without a limit.

    Workers ignore SIGTERM, which Python sends them at its end, because launchers send it to whole process groups.
    """
    atexit.unregister(_kill_workers)
    atexit.register(_kill_workers)


def _kill_workers() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a killed worker
    for child in multiprocessing.active_children():
        child.kill()
