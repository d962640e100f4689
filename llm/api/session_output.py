"""Shows the log lines and the curves of a run in a Python session, and writes its train.log."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("llm", "data")
"""Packages whose log lines describe a run."""


@contextlib.contextmanager
def run_logged(folder: Path) -> Iterator[None]:
    """Write the run's log lines to train.log, and to standard output unless the session has handlers of its own.

    The caller restores levels and handlers; see `llm.api.process_state`.
    """
    file = logging.FileHandler(folder / "train.log", encoding="utf-8")
    handlers: list[logging.Handler] = [file] if logging.root.handlers else [file, logging.StreamHandler(sys.stdout)]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        logging.root.addHandler(handler)
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        yield
    finally:
        file.close()


def show_picture(path: Path) -> None:
    """Display a picture file in the output of a notebook's cell. Do nothing outside a notebook, or without the file."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or shell.__class__.__name__ != "ZMQInteractiveShell" or not path.is_file():
        return
    from IPython.display import Image, display  # pyright: ignore[reportMissingImports]

    display(Image(filename=str(path)))
