"""Writes and reads metrics.jsonl: one JSON object per line, written before a call returns, complete after any kill."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.run_folder.atomic_files import parse_object

Record = dict[str, Any]


class MetricsFile:
    """A file with one line per step. Lines that a full disk refuses wait in memory and are written first later.

    Args:
        path: the file, which the first line creates.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: tuple[int, Record] | None = None  # offset and content of the newest line
        self._waiting: list[Record] = []

    def append(self, record: Record) -> None:
        """Add a line, or extend the newest line where it is of the same step.

        Raises:
            OSError: the line could not be written, for example on a full disk. The file is unchanged, or lacks its
                newest line, which then waits in memory as well.
        """
        offset = None
        if self._waiting and self._waiting[-1]["step"] == record["step"]:
            self._waiting[-1] |= record
        elif not self._waiting and self._last is not None and self._last[1]["step"] == record["step"]:
            offset = self._last[0]
            self._waiting.append(self._last[1] | record)
        else:
            self._waiting.append(record)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._write_waiting(file, os.fstat(file).st_size if offset is None else offset)
        finally:
            os.close(file)

    def read(self) -> list[Record]:
        """Return the lines without an incomplete last one."""
        if not self.path.exists():
            return []
        return [record for line in self.path.read_bytes().splitlines() if (record := parse_object(line)) is not None]

    def forget_newest(self) -> None:
        """Start a new line at the next `append`, because the file has been replaced."""
        self._last, self._waiting = None, []

    def _write_waiting(self, file: int, offset: int) -> None:
        lines = [json.dumps(record).encode() + b"\n" for record in self._waiting]
        content = b"".join(lines)
        try:
            done = 0
            while done < len(content):
                done += os.pwrite(file, content[done:], offset + done)
            os.ftruncate(file, offset + done)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file, offset)  # remove the partial line
            self._last = None
            raise
        self._last = (offset + len(content) - len(lines[-1]), self._waiting[-1])
        self._waiting = []


class LineReader:
    """A reader of files of JSON objects that parses only the lines which are new since its last call.

    Args:
        keep: returns the part of a line to remember, None to discard the line. Lines without a step are discarded.
    """

    def __init__(self, keep: Callable[[Record], Record | None]) -> None:
        self.keep = keep
        self._parsed: dict[Path, tuple[int, int, list[Record]]] = {}  # inode, offset, lines before the offset

    def read(self, path: Path) -> list[Record]:
        """Return the lines of a file that a run may be writing.

        The last line is parsed again each time, since it may still be extended. A resumed run replaces the file, which
        its inode shows.
        """
        if not path.exists():
            return []
        with open(path, "rb") as file:
            inode, size = os.fstat(file.fileno()).st_ino, os.fstat(file.fileno()).st_size
            known, offset, lines = self._parsed.get(path, (inode, 0, []))
            if known != inode or size < offset:
                offset, lines = 0, []
            file.seek(offset)
            *whole, _ = file.read().split(b"\n")
        settled = [record for line in whole[:-1] if (record := self._parse(line)) is not None]
        offset += sum(len(line) + 1 for line in whole[:-1])
        self._parsed[path] = (inode, offset, [*lines, *settled])
        last = self._parse(whole[-1]) if whole else None
        return [*lines, *settled, *([] if last is None else [last])]

    def _parse(self, line: bytes) -> Record | None:
        record = parse_object(line)
        return self.keep(record) if record is not None and "step" in record else None
