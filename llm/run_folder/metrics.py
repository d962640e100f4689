"""metrics.jsonl: one object a line, in the file when a call returns, and whole after any kill."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class MetricsFile:
    """Appends lines by step; what a full disk does not take waits in memory and goes first when there is room.

    Args:
        path: the file; made by the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: tuple[int, Record] | None = None  # where the newest line begins, and what it says
        self._waiting: list[Record] = []

    def append(self, record: Record) -> None:
        """Add a line; a record of the newest line's step joins it.

        Raises:
            OSError: the disk is full or the like; the file is as it was, or lacks its newest line, which waits too.
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
        """Return the lines; a last one that a kill cut off is left out."""
        if not self.path.exists():
            return []
        return [record for line in self.path.read_bytes().splitlines() if (record := parse_object(line)) is not None]

    def forget_newest(self) -> None:
        """Join nothing to what is there: the file has been replaced."""
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
                os.ftruncate(file, offset)  # half a line is none
            self._last = None
            raise
        self._last = (offset + len(content) - len(lines[-1]), self._waiting[-1])
        self._waiting = []


def parse_object(line: bytes) -> Record | None:
    """Return the object in a line of JSON, None where there is none."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class LineReader:
    """Follows files of JSON objects while runs write them.

    Args:
        keep: what to remember of a line that has a step; None: nothing of it.
    """

    def __init__(self, keep: Callable[[Record], Record | None]) -> None:
        self.keep = keep
        self._parsed: dict[Path, tuple[int, int, list[Record]]] = {}  # inode, offset, lines before it

    def read(self, path: Path) -> list[Record]:
        """Parse what is new. The last line may still change; a resumed run replaces the file."""
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
        try:
            record = json.loads(line)
        except ValueError:
            return None
        return self.keep(record) if isinstance(record, dict) and "step" in record else None
