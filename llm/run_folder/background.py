"""A thread that does the slow part of saving while training goes on."""

import threading
from collections import deque
from collections.abc import Callable


class BackgroundWriter:
    """Runs tasks one after the other in a thread of its own; after a failure it runs none until that was raised.

    The thread is a daemon: a process that has to leave at once does not wait for it, since what it writes appears whole
    or not at all.
    """

    def __init__(self) -> None:
        self._tasks: deque[Callable[[], object]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_abandoned = False

    def submit(self, task: Callable[[], object]) -> None:
        """Queue a task behind those before it."""
        with self._changed:
            self._tasks.append(task)
            self._changed.notify_all()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="checkpoint writer", daemon=True)
                self._thread.start()

    def check(self) -> None:
        """Raise what a task has failed with, once; the tasks behind it are dropped."""
        with self._changed:
            error, self._error = self._error, None
            if error is not None:
                self._tasks.clear()
        if error is not None:
            raise error

    def wait(self) -> None:
        """Return when every task is done; raise what one has failed with."""
        with self._changed:
            self._changed.wait_for(lambda: not self._tasks or self._error is not None or self._is_abandoned)
        self.check()

    def abandon(self) -> None:
        """Wait for nothing any more: the process is about to leave."""
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
            except BaseException as caught:  # raised again where training can be stopped
                error = caught
            with self._changed:
                self._error = error
                if self._tasks and error is None:
                    self._tasks.popleft()
                self._changed.notify_all()

    def __getstate__(self) -> dict[str, object]:
        """Leave the thread behind: a copy in another process starts with nothing to do."""
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()
