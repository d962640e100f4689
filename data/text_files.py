"""Reads documents from files on disk."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence

from data.chunks import read_chunks
from data.compressed import compression_of, naming, open_binary
from data.patterns import matching_files
from data.readers import LINES, TABLES, format_of, is_json_lines, read_json_lines, read_table, refuse_binary
from data.sources import Piece, RawDocument, group_files, hash_settings, piece_bytes, stat_files
from llm.errors import ConfigError

_AUTO_DOCUMENTS = 500  # 1 % of them are then about five documents, and fewer than 1 % of corpora have none


class TextFiles:
    """Files on disk: plain text, JSON lines, and json, csv, tsv, parquet or arrow tables, also compressed.

    `datasets` reads csv, tsv, parquet and arrow. The other formats are read here, so that errors name the file and the
    line, and one large file is shared among several processes. Files with an unknown ending are plain text.

    Args:
        files: a path or glob (`**` crosses folders), or a list of them.
        field: the field that holds the text, where files hold records.
        document_bytes: size of the documents into which plain text is cut at line ends, in bytes. A line that is much
            longer is cut at a space. None makes each file one document. `auto` does so from 500 files on; below that
            it makes about 500 documents of 1 to 64 KiB, so that a share of whole documents can be held out. Records are
            documents already.
        broken_lines: `raise`, or `skip` to skip and count lines that are no JSON object with the field.
        val_files: a path, a glob or a list of them: the validation set, which is read whole. Its plain text is cut
            like that of `files`. None holds out `loader.val_fraction` of the documents.

    Raises:
        ConfigError: `broken_lines` or `document_bytes` is out of range.
        DataError: a file is missing, empty, truncated or binary, or a glob matches nothing.
    """

    is_scored = False

    def __init__(
        self,
        *,
        files: str | Sequence[str],
        field: str,
        document_bytes: int | str | None,
        broken_lines: str,
        val_files: str | Sequence[str] | None = None,
    ):
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
        self.val_files = val_files
        self._key = "data.files"

    @property
    def validation(self) -> "TextFiles | None":
        """See Source."""
        if self.val_files is None:
            return None
        own = TextFiles(
            files=self.val_files,
            field=self.field,
            document_bytes=self._unit(self.files()),  # cut differently, equal texts would not be equal documents
            broken_lines=self.broken_lines,
        )
        own._key = "data.val_files"
        return own

    def files(self) -> list[str]:
        """List the files that each pattern matches, in order and once."""
        return matching_files(self._key, self.patterns)

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
        whole: list[str] = []  # consecutive files that are read whole, grouped so that the order is kept
        for path in paths:
            ranges = self._ranges(path, target, unit)
            if ranges is None:
                whole.append(path)
                continue
            pieces += group_files(whole, unit) + ranges
            whole = []
        return pieces + group_files(whole, unit)

    def _unit(self, paths: Sequence[str]) -> int | None:
        """Return the bytes per document of plain text, or None where each file is one document."""
        if not isinstance(self.document_bytes, str):
            return self.document_bytes
        sizes = [os.path.getsize(path) for path in paths if format_of(path) == ".txt"]
        if len(sizes) >= _AUTO_DOCUMENTS:
            return None
        return min(max(sum(sizes) // _AUTO_DOCUMENTS, 1 << 10), 1 << 16)

    def _ranges(self, path: str, target: int, document_bytes: int | None) -> list[Piece] | None:
        """Divide a large file that can be read from its middle; return None for any other file."""
        kind = format_of(path)
        if kind not in TABLES:
            with naming(path):
                refuse_binary(path)
        size = os.path.getsize(path)
        unit = 1 if kind in LINES else document_bytes if kind == ".txt" else None
        if compression_of(path) or unit is None or size <= target:
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
            with naming(path):
                yield from self._read_file(path, piece, counts)

    def _read_file(self, path: str, piece: Piece, counts: Counter[str]) -> Iterator[RawDocument]:
        kind = format_of(path)
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
