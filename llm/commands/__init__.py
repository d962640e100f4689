"""The command line: one module per command, and modules that several commands share."""

from llm.commands.streams import open_closed_streams

open_closed_streams()  # before a command opens its first file
