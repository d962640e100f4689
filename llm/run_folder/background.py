"""Runs the slow part of saving in a thread while training continues."""

import threading
from collections import deque
from collections.abc import Callable


class BackgroundWriter:
    """A queue of tasks that one thread runs in order. After a failure it runs no task until the error was raised.

    The thread is a daemon, so a process that must exit at once does not wait for it. That is safe, because its tasks
    publish files by one rename.
    """

    def __init__(self) -> None:
        self._tasks: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_abandoned = False

    def submit(self, task: Callable[[], object]) -> None:
        """Add a task to the end of the queue."""
        with self._changed:
            self._tasks.append(task)
            self._changed.notify_all()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="checkpoint writer", daemon=True)
                self._thread.start()

    def check(self) -> None:
        """Raise the error of a failed task once, and discard the tasks behind it."""
        with self._changed:
            error, self._error = self._error, None
            if error is not None:
                self._tasks.clear()
        if error is not None:
            raise error

    def wait(self) -> None:
        """Return when every task is done, or raise the error of a failed task."""
        with self._changed:
            self._changed.wait_for(lambda: not self._tasks or self._error is not None or self._is_abandoned)
        self.check()

    def abandon(self) -> None:
        """Make `wait` return at once, because the process is about to exit."""
        with self._changed:
            self._is_abandoned = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._tasks and self._error is None, timeout=60):
                    self._thread = None
                    return
                task = self._tasks[0]
            error: BaseException | None = None
            try:
                task()
            except BaseException as caught:  # `check` and `wait` raise it in the training thread
                error = caught
            with self._changed:
                self._error = error
                if self._tasks and error is None:
                    self._tasks.popleft()
                self._changed.notify_all()

    def __getstate__(self) -> dict[str, object]:
        """Return no state: a copy in another process starts with an empty queue and without a thread."""
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()
