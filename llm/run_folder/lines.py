"""The lines of a growing metrics.jsonl, read again and again without parsing what has been parsed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class LineReader:
    """Follows files of JSON objects while runs write them.

    Args:
        keep: what to remember of a line that has a step; None: nothing of it.
    """

    def __init__(self, keep: Callable[[Line], Line | None]) -> None:
        self.keep = keep
        self._parsed: dict[Path, tuple[int, int, list[Line]]] = {}  # inode, offset, lines before it

    def read(self, path: Path) -> list[Line]:
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

    def _parse(self, line: bytes) -> Line | None:
        try:
            record = json.loads(line)
        except ValueError:
            return None
        return self.keep(record) if isinstance(record, dict) and "step" in record else None
