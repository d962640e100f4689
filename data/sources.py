"""What a source of documents is, and the one that every machine has: the running Python's own source files.

A source lists its work as pieces that separate processes can read, always cut alike whatever their number, so the
token stream of a corpus never depends on the machine that built it.
"""

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from data.cleaning import ScoredText
from llm.errors import DataError

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
    unit: int | None = None
    """Bytes of a document where files are cut into documents; `start` and `stop` then count documents."""


@runtime_checkable
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


def group_files(paths: Sequence[str], unit: int | None = None) -> list[Piece]:
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
            pieces.append(Piece(tuple(members), 0, None, size, unit))
            members, size = [], 0
    if members:
        pieces.append(Piece(tuple(members), 0, None, size, unit))
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
