"""Where documents come from: the running Python's own source, files on disk, or any dataset of the Hugging Face hub.

A source lists its work as pieces that separate processes can read, always cut alike whatever their number, so the
token stream of a corpus never depends on the machine that built it.
"""

import glob
import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.cleaning import ScoredText
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
from llm.errors import ConfigError, DataError

RawDocument = str | bytes | ScoredText
_MIN_PIECE_BYTES = 1 << 18
_MAX_PIECE_BYTES = 1 << 29
_PIECES = 64  # enough to balance processes, few enough that files stay large


class Piece(NamedTuple):
    """One share of a source: some whole files, or a range of one."""

    paths: tuple[str, ...]
    start: int
    stop: int | None
    size: int
    """Bytes, or rows where bytes are unknown: for the progress bar alone."""


class Source(Protocol):
    """What the token cache asks of a source; a source must survive pickling."""

    is_scored: bool
    """Whether its documents are ScoredText."""

    def fingerprint(self) -> str:
        """Return a name for the content that changes whenever the content may have changed."""
        ...

    def pieces(self) -> list[Piece]:
        """List the pieces in the order of the token stream; raises DataError when there is nothing to read."""
        ...

    def read(self, piece: Piece, counts: Counter[str]) -> Iterator[RawDocument]:
        """Yield one piece's documents in order, adding what was skipped to `counts`."""
        ...

    def hint(self) -> str:
        """Say what a user can do when the corpus holds too few documents."""
        ...


def hash_settings(settings: Any) -> str:
    """Return 32 hexadecimal digits that name plain data."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def stat_files(paths: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return path, size and modification time of each file: what a changed corpus changes."""
    stats = [os.stat(path) for path in paths]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]


def group_files(paths: Sequence[str]) -> list[Piece]:
    """Gather whole files, in order, into pieces of a sensible size."""
    sizes = [os.path.getsize(path) for path in paths]
    target = piece_bytes(sum(sizes))
    pieces: list[Piece] = []
    members: list[str] = []
    size = 0
    for path, length in zip(paths, sizes, strict=True):
        members.append(path)
        size += length
        if size >= target:
            pieces.append(Piece(tuple(members), 0, None, size))
            members, size = [], 0
    if members:
        pieces.append(Piece(tuple(members), 0, None, size))
    return pieces


def piece_bytes(total: int) -> int:
    """Return the size of a piece for a corpus of `total` bytes."""
    return min(max(total // _PIECES, _MIN_PIECE_BYTES), _MAX_PIECE_BYTES)


class PythonSource:
    """Gives real text on every machine, with no download: the source files of the running Python's standard library.

    Each `.py` file is one document. The tests of the library are left out unless asked for: some systems install
    Python without them, and half of them is data.

    Args:
        site_packages: Whether to add the source of the installed packages.
        tests: Whether to add the library's tests.
    """

    is_scored = False
    _TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
    _SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})

    def __init__(self, *, site_packages: bool, tests: bool):
        self.site_packages = site_packages
        self.tests = tests

    def files(self) -> list[str]:
        """List the files, sorted."""
        found = self._walk(sysconfig.get_path("stdlib"))
        if self.site_packages:
            for folder in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
                found += self._walk(folder)
        if not found:
            raise DataError("data=python: this Python has no source files; use data=text data.files=<path or glob>")
        return found

    def _walk(self, root: str) -> list[str]:
        skipped = self._SKIPPED_FOLDERS if self.tests else self._SKIPPED_FOLDERS | self._TEST_FOLDERS
        found = []
        for folder, children, names in os.walk(root):
            children[:] = sorted(set(children) - skipped)
            found += [os.path.join(folder, name) for name in sorted(names) if name.endswith(".py")]
        return found

    def fingerprint(self) -> str:
        """See Source."""
        return hash_settings(["python", stat_files(self.files())])

    def pieces(self) -> list[Piece]:
        """See Source."""
        return group_files(self.files())

    def read(self, piece: Piece, counts: Counter[str]) -> Iterator[RawDocument]:
        """See Source."""
        for path in piece.paths:
            yield Path(path).read_bytes()

    def hint(self) -> str:
        """See Source."""
        return "add text with data.tests=true or data.site_packages=true"


class TextFiles:
    """Reads files on disk: plain text, JSON lines, and json, csv, tsv, parquet or arrow tables, also compressed.

    Tables are read by `datasets`. Plain text and JSON lines are read here, so that a broken line is named by file
    and number and one large file feeds several processes. Files that end in none of the known ways are plain text.

    Args:
        files: A path or glob (`**` crosses folders), or a list of them.
        field: The field that holds the text, where files hold records.
        document_bytes: Cut plain text into documents of about this many bytes, at line ends; None makes each file
            one document. Records are documents already.
        broken_lines: `raise`, or `skip` to leave out and count lines that are no JSON.

    Raises:
        ConfigError: `broken_lines` or `document_bytes` is out of range.
        DataError: a file is missing, empty or binary, or a glob matches nothing.
    """

    is_scored = False

    def __init__(self, *, files: str | Sequence[str], field: str, document_bytes: int | None, broken_lines: str):
        if broken_lines not in ("raise", "skip"):
            raise ConfigError(f"data.broken_lines={broken_lines}: unknown; choose raise or skip")
        if document_bytes is not None and document_bytes < 1:
            raise ConfigError(f"data.document_bytes={document_bytes}: must be at least 1; or null for whole files")
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
        return hash_settings(["text", stat_files(self.files()), self.field, self.document_bytes, self.broken_lines])

    def pieces(self) -> list[Piece]:
        """See Source."""
        paths = self.files()
        target = piece_bytes(sum(os.path.getsize(path) for path in paths))
        pieces: list[Piece] = []
        whole: list[str] = []  # a run of files that are read whole, gathered to keep the order
        for path in paths:
            ranges = self._ranges(path, target)
            if ranges is None:
                whole.append(path)
                continue
            pieces += group_files(whole) + ranges
            whole = []
        return pieces + group_files(whole)

    def _ranges(self, path: str, target: int) -> list[Piece] | None:
        """Cut a large file that can be read from its middle; None for any other."""
        kind, compression = suffixes(path)
        if kind not in TABLES:
            refuse_binary(path)
        size = os.path.getsize(path)
        unit = 1 if kind in LINES else self.document_bytes if kind == ".txt" else None
        if compression or unit is None or size <= target:
            return None
        step = max(target // unit, 1)
        count = -(-size // unit)
        return [
            Piece((path,), start, min(start + step, count), min(step * unit, size - start * unit))
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
                    if self.document_bytes is None:
                        yield file.read()
                    else:
                        yield from read_chunks(file, size=self.document_bytes, first=piece.start, last=piece.stop)

    def hint(self) -> str:
        """See Source."""
        if self.document_bytes is None:
            return "give more files, or cut them into documents with data.document_bytes=16384"
        return "give more text, or a smaller data.document_bytes"
