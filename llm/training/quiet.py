"""Keeps what libraries report of themselves out of a run's output."""

import logging
import warnings
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

LIBRARIES = ("lightning.pytorch", "lightning.fabric")
KNOWN = (
    ".*LeafSpec.*",
    ".*smaller than the logging interval.*",
    ".*does not have many workers.*",
    ".*your dataloader is not resumable.*",
    ".*module.s. in eval mode at the start of training.*",
)
"""Warnings that describe no fault of a run."""


def quiet_libraries() -> None:
    """Silence Lightning's own messages, and all ranks except the first; warnings about the run are still shown.

    Warnings of what a library will change in future versions go to the log at the level INFO.
    """
    if rank_zero_only.rank != 0:
        logging.getLogger("llm").setLevel(logging.ERROR)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in KNOWN:
        warnings.filterwarnings("ignore", message=message)
    if not isinstance(warnings.showwarning, _ShownWarnings):
        warnings.showwarning = _ShownWarnings(warnings.showwarning)


class _ShownWarnings:
    """A replacement of `warnings.showwarning` that logs warnings of deprecation."""

    def __init__(self, shown: Any) -> None:
        self.shown = shown

    def __call__(self, message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if issubclass(category, FutureWarning | DeprecationWarning):
            logging.getLogger("py.warnings").info("%s:%d: %s: %s", filename, lineno, category.__name__, message)
        else:
            self.shown(message, category, filename, lineno, *rest)
