"""Reading files: plain and compressed text, JSON lines, and tables through `datasets`."""

import bz2
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Iterator
from typing import Any

from llm.errors import DataError, did_you_mean

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".json": "json"}
LINES = (".jsonl", ".ndjson")
_SNIFFED_BYTES = 8192


def suffixes(path: str) -> tuple[str, str]:
    """Split a path's ending into format and compression: `a.jsonl.gz` gives `(".jsonl", ".gz")`."""
    name = path.lower()
    compression = next((ending for ending in COMPRESSED if name.endswith(ending)), "")
    name = name.removesuffix(compression)
    known = next((ending for ending in (*LINES, *TABLES) if name.endswith(ending)), ".txt")
    return known, compression


def open_binary(path: str) -> io.BufferedIOBase:
    """Open a file for reading bytes, decompressing by its ending (gz, bz2, xz, zst)."""
    compression = suffixes(path)[1]
    if compression == ".gz":
        return gzip.GzipFile(path)
    if compression == ".bz2":
        return bz2.BZ2File(path)
    if compression == ".xz":
        return lzma.LZMAFile(path)
    if compression == ".zst":
        import pyarrow  # it brings zstandard, which the standard library lacks before Python 3.14

        return io.BufferedReader(pyarrow.CompressedInputStream(path, "zstd"))  # pyright: ignore[reportArgumentType]
    return open(path, "rb")


def refuse_binary(path: str) -> None:
    """Raise DataError when the file holds a zero byte early on, which text does not."""
    try:
        with open_binary(path) as file:
            head = file.read(_SNIFFED_BYTES)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"data.files={path}: cannot be read ({error}); check the file and its ending") from error
    if (offset := head.find(b"\0")) >= 0:
        raise DataError(f"data.files={path}: binary, not text (zero byte at offset {offset}); leave it out")


def read_chunks(file: io.BufferedIOBase, *, size: int, first: int = 0, last: int | None = None) -> Iterator[bytes]:
    """Cut a file into documents of about `size` bytes that end at line ends; yield those numbered first..last-1.

    Document k ends with the line that holds byte (k + 1) * size - 1, so any range of documents can be read alone.
    """
    position = 0
    if first:
        file.seek(first * size - 1)
        file.readline()
        position = file.tell()
    k = first
    while last is None or k < last:
        k += 1
        missing = k * size - position
        if missing <= 0:  # one line was longer than a document
            continue
        chunk = file.read(missing)
        if not chunk:
            return
        if not chunk.endswith(b"\n"):
            chunk += file.readline()
        position += len(chunk)
        yield chunk


def read_json_lines(
    path: str, *, field: str, broken_lines: str, counts: Counter[str], start: int = 0, stop: int | None = None
) -> Iterator[str]:
    """Yield the text field of the records whose lines begin in bytes start..stop-1.

    Raises:
        DataError: a broken line (file and line named) unless `broken_lines` is "skip", which counts it instead;
            a record without the field (its fields listed).
    """
    with open_binary(path) as file:
        position = start
        if start:
            file.seek(start - 1)
            position += len(file.readline()) - 1
        while stop is None or position < stop:
            line = file.readline()
            if not line:
                return
            line_start, position = position, position + len(line)
            if line.isspace():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
                text = text_field(record, field, path)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                if broken_lines == "skip":
                    counts["broken_lines"] += 1
                    continue
                number = _line_number(path, line_start)
                raise DataError(
                    f"data.files={path}: line {number} is broken ({error}); mend it or set data.broken_lines=skip"
                ) from error
            yield text


def text_field(record: dict[str, Any], field: str, path: str) -> str:
    """Return a record's text; DataError lists the fields there are, ValueError says that it is no text."""
    if field not in record:
        present = ", ".join(map(str, record))
        raise DataError(f"data.field={field}: not in {path}; its fields are {present}{did_you_mean(field, record)}")
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"field {field} holds {type(text).__name__}, not text")
    return text


def read_table(path: str, *, field: str) -> Iterator[str]:
    """Yield one column of a csv, tsv, parquet, arrow or json file, streamed by `datasets`."""
    import datasets

    builder = TABLES[suffixes(path)[0]]
    options: dict[str, Any] = {"sep": "\t"} if suffixes(path)[0] == ".tsv" else {}
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(builder, data_files=[path], split="train", streaming=True, **options)
        for record in table:
            yield text_field(dict(record), field, path)
    except DataError:
        raise
    except Exception as error:  # each format has its own parser with its own errors
        cause = error.__cause__ or error
        raise DataError(f"data.files={path}: cannot be read as {builder} ({cause}); mend it or leave it out") from error


def is_json_lines(path: str) -> bool:
    """Say whether a `.json` file holds one object a line rather than one array or object."""
    with open_binary(path) as file:
        line = file.readline()
        try:
            return isinstance(json.loads(line), dict) and bool(file.readline(1))
        except ValueError:
            return False


def _line_number(path: str, offset: int) -> int:
    number = 1
    with open_binary(path) as file:
        while offset > 0:
            block = file.read(min(offset, 1 << 20))
            number += block.count(b"\n")
            offset -= len(block)
    return number
