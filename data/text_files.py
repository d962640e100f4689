"""Files on disk as documents."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from data.readers import (
    LINES,
    TABLES,
    is_json_lines,
    open_binary,
    read_chunks,
    read_json_lines,
    read_table,
    refuse_binary,
    suffixes,
)
from data.sources import Piece, RawDocument, group_files, hash_settings, piece_bytes, stat_files
from llm.errors import ConfigError, DataError

_AUTO_DOCUMENTS = 500  # a validation share of 1 % is then about five documents, and none in under 1 % of corpora


class TextFiles:
    """Reads files on disk: plain text, JSON lines, and json, csv, tsv, parquet or arrow tables, also compressed.

    Tables are read by `datasets`. Plain text and JSON lines are read here, so that a broken line is named by file
    and number and one large file feeds several processes. Files that end in none of the known ways are plain text.

    Args:
        files: A path or glob (`**` crosses folders), or a list of them.
        field: The field that holds the text, where files hold records.
        document_bytes: Cut plain text into documents of about this many bytes, at line ends; None makes each file
            one document; `auto` does so from 500 files on, and else cuts them into about 500 documents of 1 to 64 KiB,
            so that a share of whole documents can be held out. Records are documents already.
        broken_lines: `raise`, or `skip` to leave out and count lines that are no JSON.

    Raises:
        ConfigError: `broken_lines` or `document_bytes` is out of range.
        DataError: a file is missing, empty or binary, or a glob matches nothing.
    """

    is_scored = False

    def __init__(self, *, files: str | Sequence[str], field: str, document_bytes: int | str | None, broken_lines: str):
        if broken_lines not in ("raise", "skip"):
            raise ConfigError(f"data.broken_lines={broken_lines}: unknown; choose raise or skip")
        if document_bytes not in (None, "auto") and (isinstance(document_bytes, str) or document_bytes < 1):
            raise ConfigError(
                f"data.document_bytes={document_bytes}: must be at least 1, auto, or null for whole files"
            )
        self.patterns = [files] if isinstance(files, str) else list(files)
        self.field = field
        self.document_bytes = document_bytes
        self.broken_lines = broken_lines

    def files(self) -> list[str]:
        """List the files each pattern matches, in order and once."""
        found: dict[str, None] = {}
        for pattern in self.patterns:
            found |= dict.fromkeys(self._matches(os.path.expanduser(pattern)))
        if not found:
            raise DataError(f"data.files={self.patterns}: names no file; give a path or a glob")
        if not any(os.path.getsize(path) for path in found):
            raise DataError(f"data.files={', '.join(self.patterns)}: every file is empty; check the path")
        return list(found)

    @staticmethod
    def _matches(pattern: str) -> list[str]:
        if os.path.isfile(pattern):
            if not os.path.getsize(pattern):
                raise DataError(f"data.files={pattern}: the file is empty; check the path")
            return [os.path.abspath(pattern)]
        if os.path.isdir(pattern):
            raise DataError(f"data.files={pattern}: is a folder; name its files with a glob such as {pattern}/**/*.txt")
        if not glob.has_magic(pattern):
            raise DataError(f"data.files={pattern}: no such file; check the path (relative to {os.getcwd()})")
        found = sorted(os.path.abspath(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
        if not found:
            raise DataError(f"data.files={pattern}: the glob matches no file; check it (relative to {os.getcwd()})")
        return found

    def fingerprint(self) -> str:
        """See Source."""
        paths = self.files()
        return hash_settings(["text", stat_files(paths), self.field, self._unit(paths), self.broken_lines])

    def pieces(self) -> list[Piece]:
        """See Source."""
        paths = self.files()
        unit = self._unit(paths)
        target = piece_bytes(sum(os.path.getsize(path) for path in paths))
        pieces: list[Piece] = []
        whole: list[str] = []  # a run of files that are read whole, gathered to keep the order
        for path in paths:
            ranges = self._ranges(path, target, unit)
            if ranges is None:
                whole.append(path)
                continue
            pieces += group_files(whole, unit) + ranges
            whole = []
        return pieces + group_files(whole, unit)

    def _unit(self, paths: Sequence[str]) -> int | None:
        """Return the bytes of a plain-text document, or None where each file is one."""
        if not isinstance(self.document_bytes, str):
            return self.document_bytes
        sizes = [os.path.getsize(path) for path in paths if suffixes(path)[0] == ".txt"]
        if len(sizes) >= _AUTO_DOCUMENTS:
            return None
        return min(max(sum(sizes) // _AUTO_DOCUMENTS, 1 << 10), 1 << 16)

    def _ranges(self, path: str, target: int, document_bytes: int | None) -> list[Piece] | None:
        """Cut a large file that can be read from its middle; None for any other."""
        kind, compression = suffixes(path)
        if kind not in TABLES:
            refuse_binary(path)
        size = os.path.getsize(path)
        unit = 1 if kind in LINES else document_bytes if kind == ".txt" else None
        if compression or unit is None or size <= target:
            return None
        step = max(target // unit, 1)
        count = -(-size // unit)
        return [
            Piece((path,), start, min(start + step, count), min(step * unit, size - start * unit), document_bytes)
            for start in range(0, count, step)
        ]

    def read(self, piece: Piece, counts: Counter[str]) -> Iterator[RawDocument]:
        """See Source."""
        for path in piece.paths:
            kind = suffixes(path)[0]
            if kind in LINES or (kind == ".json" and is_json_lines(path)):
                yield from read_json_lines(
                    path,
                    field=self.field,
                    broken_lines=self.broken_lines,
                    counts=counts,
                    start=piece.start,
                    stop=piece.stop,
                )
            elif kind in TABLES:
                yield from read_table(path, field=self.field)
            else:
                with open_binary(path) as file:
                    if piece.unit is None:
                        yield file.read()
                    else:
                        yield from read_chunks(file, size=piece.unit, first=piece.start, last=piece.stop)

    def hint(self) -> str:
        """See Source."""
        if self.document_bytes is None:
            return "give more files, or cut them into documents with data.document_bytes=auto"
        return "give more text"
