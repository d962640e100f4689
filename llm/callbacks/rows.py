"""Logs tables with the loggers that can show them."""

from collections.abc import Sequence
from typing import Any

import lightning as L

from llm.contracts import RowLogger


def log_rows(
    trainer: L.Trainer, pl_module: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Log a table with each logger that can show one."""
    for logger in trainer.loggers:
        if isinstance(logger, RowLogger):
            logger.log_rows(name, columns, rows, tokens_seen=pl_module.tokens_seen(trainer.global_step))
