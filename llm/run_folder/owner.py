"""Records which process writes to a run folder, so that a second process is refused."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from llm.run_folder.atomic_files import TEMPORARY, read_object, replace_text

ABANDONED_AFTER = 900.0
"""Seconds without an update of the lock after which a run on another host counts as dead.

A process on another host cannot be looked up. A live run updates its lock every 30 seconds, and 900 tolerates a slow
network file system.
"""
_UPDATE_EVERY = 30.0
"""Seconds between two updates of the lock's modification time."""


class OwnerFile:
    """The file `run.lock` of a run folder, which names the process that writes to the folder.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        self._updated = 0.0

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let one process at a time read and write the lock.

        Some network file systems have no locks. There the run continues without this protection.
        """
        with open(self.path.with_name(f"{TEMPORARY}claim"), "w") as guard:
            with contextlib.suppress(OSError):
                fcntl.flock(guard, fcntl.LOCK_EX)
            yield

    def take(self) -> None:
        """Make this process the owner."""
        replace_text(self.path, json.dumps(_this_process()))

    def is_foreign(self) -> bool:
        """Return whether a file of this name exists that no run wrote."""
        return self.path.exists() and not {"pid", "host"} <= (read_object(self.path) or {}).keys()

    def release(self) -> None:
        """Remove the lock if this process is the owner."""
        if read_object(self.path) == _this_process():
            self.path.unlink(missing_ok=True)

    def other_owner(self) -> dict[str, Any] | None:
        """Return the live process that owns the folder, None where there is none or where it is this process."""
        owner = read_object(self.path)
        if owner is None or "pid" not in owner or owner == _this_process():
            return None
        if owner.get("host") == socket.gethostname():
            return owner if _started(owner["pid"]) == owner.get("started") else None
        return owner if time.time() - self.path.stat().st_mtime < ABANDONED_AFTER else None

    def refresh(self) -> None:
        """Update the lock's modification time from time to time, so that other hosts see that the run is alive."""
        if time.monotonic() - self._updated > _UPDATE_EVERY:
            self._updated = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}


def _started(pid: int) -> float | None:
    """Return when a process started, None where it has ended.

    The system reuses process numbers. The start time tells a process from a later one of the same number.
    """
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
