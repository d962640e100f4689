"""Defines a source of documents, and the source that every machine has: the running Python's own source files.

A source lists its work as pieces that separate processes can read. The pieces do not depend on the number of
processes, so the token stream of a corpus never depends on the machine that built it.
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
from llm.errors import ConfigError, DataError, did_you_mean

RawDocument = str | bytes | ScoredText
_MIN_PIECE_BYTES = 1 << 18
_MAX_PIECE_BYTES = 1 << 29
_PIECES = 64  # enough to balance processes, few enough that files stay large


class Piece(NamedTuple):
    """One share of a source: some whole files, or a range of one file."""

    paths: tuple[str, ...]
    start: int
    stop: int | None
    size: int
    """Bytes, or rows where bytes are unknown; only the progress bar reads it."""
    unit: int | None = None
    """Bytes per document where files are cut into documents; `start` and `stop` then count documents."""


@runtime_checkable
class Source(Protocol):
    """A source of documents, as the token cache uses it; it must survive pickling."""

    is_scored: bool
    """Whether its documents are ScoredText."""

    @property
    def validation(self) -> "Source | None":
        """The user's own validation set; None where a share of the documents is held out instead."""
        ...

    def fingerprint(self) -> str:
        """Return a name for the content that changes whenever the content may have changed."""
        ...

    def pieces(self) -> list[Piece]:
        """List the pieces in the order of the token stream; raise DataError where there is nothing to read."""
        ...

    def read(self, piece: Piece, counts: Counter[str]) -> Iterator[RawDocument]:
        """Yield one piece's documents in order, and add those that it skips to `counts`."""
        ...

    def hint(self) -> str:
        """Return what a user can do when the corpus has too few documents."""
        ...


def hash_settings(settings: Any) -> str:
    """Return a hash of plain data, as 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def stat_files(paths: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return path, size and modification time of each file, which change when the corpus changes."""
    stats = [os.stat(path) for path in paths]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]


def group_files(paths: Sequence[str], unit: int | None = None) -> list[Piece]:
    """Group whole files, in order, into pieces of about `piece_bytes`."""
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
    """The source files of the running Python's standard library: real text on every machine, without a download.

    Each `.py` file is one document. The tests of the library are excluded by default: some systems install Python
    without them, and half of them is data.

    Args:
        site_packages: whether to add the source of the installed packages.
        tests: whether to add the library's tests.
        val_modules: modules or packages of the library that are the validation set, such as `[json, asyncio]`; the
            rest is for training. None holds out `loader.val_fraction` of the documents.

    Raises:
        ConfigError: val_modules is empty.
        DataError: this Python has no source files, or none of one of the modules.
    """

    is_scored = False
    _TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
    _SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})

    def __init__(self, *, site_packages: bool, tests: bool, val_modules: Sequence[str] | None = None):
        if val_modules is not None and not val_modules:
            raise ConfigError("data.val_modules=[]: names no module; name one, or set null")
        self.site_packages, self.tests = site_packages, tests
        self.val_modules = None if val_modules is None else sorted(val_modules)
        self._is_validation = False

    @property
    def validation(self) -> "PythonSource | None":
        """See Source."""
        if self.val_modules is None or self._is_validation:
            return None
        own = PythonSource(site_packages=False, tests=self.tests, val_modules=self.val_modules)
        own._is_validation = True
        return own

    def files(self) -> list[str]:
        """List the files, sorted."""
        library = sysconfig.get_path("stdlib")
        found = self._walk(library)
        if self.val_modules is not None:
            found = self._divided(found, library)
        if self.site_packages:
            for folder in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
                found += self._walk(folder)
        if not found:
            raise DataError("data=python: this Python has no source files; use data=text data.files=<path or glob>")
        return found

    def _divided(self, files: list[str], library: str) -> list[str]:
        """Return the files of the validation modules, or the other ones in the source for training."""
        modules = {path: os.path.relpath(path, library).split(os.sep)[0].removesuffix(".py") for path in files}
        for name in self.val_modules or []:
            if name not in modules.values():
                suggestion = did_you_mean(name, set(modules.values()))
                raise DataError(f"data.val_modules={name}: not in the standard library{suggestion}")
        return [path for path in files if (modules[path] in (self.val_modules or [])) is self._is_validation]

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
