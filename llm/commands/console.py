"""Chooses the log lines that a command prints; train.log has all of them."""

import logging

OWN = frozenset({"llm", "data", "hydra", "__main__"})
"""Packages whose lines are printed whatever their level."""


class OwnLines(logging.Filter):
    """A filter that admits the project's own lines, and the warnings and errors of libraries.

    DeepSpeed's search for compilers and Lightning's reports of processes that join are in train.log alone.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is printed."""
        return record.levelno >= logging.WARNING or record.name.split(".")[0] in OWN
