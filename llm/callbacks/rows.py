"""Tables for the loggers that show them."""

from collections.abc import Sequence
from typing import Any

import lightning as L


def log_rows(
    trainer: L.Trainer, pl_module: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Hand rows to each logger that has `log_rows(name, columns, rows, tokens_seen=…)`; others have no tables."""
    for logger in trainer.loggers:
        show = getattr(logger, "log_rows", None)
        if show is not None:
            show(name, columns, rows, tokens_seen=pl_module.tokens_seen(trainer.global_step))
