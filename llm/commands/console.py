"""Chooses the log lines that a command prints; train.log has all of them."""

import logging

OWN = frozenset({"llm", "data", "hydra", "__main__"})
"""Packages whose lines are printed whatever their level."""


def print_own_lines() -> None:
    """Make the handlers of the console print the project's lines alone; files and other handlers keep all."""
    for handler in logging.root.handlers:
        if type(handler) is logging.StreamHandler and not any(isinstance(f, OwnLines) for f in handler.filters):
            handler.addFilter(OwnLines())


class OwnLines(logging.Filter):
    """A filter that admits the project's own lines, and the warnings and errors of libraries.

    DeepSpeed's search for compilers and Lightning's reports of processes that join are in train.log alone.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is printed."""
        return record.levelno >= logging.WARNING or record.name.split(".")[0] in OWN
