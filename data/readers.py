"""Reads documents from files: plain text, JSON lines, and tables through `datasets`."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from data.compressed import compression_of, open_binary
from llm.errors import DataError, did_you_mean

TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".json": "json"}
"""Endings of files with records -> the builder of `datasets` that reads them."""
LINES = (".jsonl", ".ndjson")
_SNIFFED_BYTES = 8192


class MissingFieldError(DataError):
    """A record that lacks the field with the text."""


def format_of(path: str) -> str:
    """Return the ending that names a file's format: `.jsonl` for `a.jsonl.gz`, and `.txt` for an unknown one."""
    name = path.lower().removesuffix(compression_of(path))
    return next((ending for ending in (*LINES, *TABLES) if name.endswith(ending)), ".txt")


def refuse_binary(path: str) -> None:
    """Raise DataError where the file has a zero byte near its beginning, which text does not."""
    with open_binary(path) as file:
        head = file.read(_SNIFFED_BYTES)
    if (offset := head.find(b"\0")) >= 0:
        raise DataError(f"data.files={path}: binary, not text (zero byte at offset {offset}); exclude it")


def read_json_lines(
    path: str, *, field: str, broken_lines: str, counts: Counter[str], start: int = 0, stop: int | None = None
) -> Iterator[str]:
    """Yield the text field of the records whose lines begin in bytes start..stop-1.

    Raises:
        DataError: a line is no record or lacks the field; the error names file and line. With broken_lines "skip" such
            lines are counted instead, and only a range in which every record lacks the field is an error.
    """
    missing: MissingFieldError | None = None
    has_text = False
    for line, line_start in _lines(path, start, stop):
        try:
            text = _text_of_line(line, field, path)
        except (ValueError, RecursionError, MissingFieldError) as error:
            if broken_lines == "skip":
                counts["broken_lines"] += 1
                missing = error if missing is None and isinstance(error, MissingFieldError) else missing
                continue
            raise _named_by_line(error, path, _line_number(path, line_start)) from error
        has_text = True
        yield text
    if missing is not None and not has_text:
        raise missing


def _lines(path: str, start: int, stop: int | None) -> Iterator[tuple[bytes, int]]:
    """Yield the lines that begin in bytes start..stop-1 and are not empty, with their offsets."""
    with open_binary(path) as file:
        position = start
        if start:
            file.seek(start - 1)
            position += len(file.readline()) - 1
        while stop is None or position < stop:
            line = file.readline()
            if not line:
                return
            if not line.isspace():
                yield line, position
            position += len(line)


def _text_of_line(line: bytes, field: str, path: str) -> str:
    record = json.loads(line)  # raises ValueError, or RecursionError where it is nested too deeply
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return text_field(record, field, path)


def _named_by_line(error: Exception, path: str, number: int) -> DataError:
    if isinstance(error, MissingFieldError):
        return MissingFieldError(f"{error} (line {number}); correct data.field, or set data.broken_lines=skip")
    reason = "nested too deeply" if isinstance(error, RecursionError) else error
    return DataError(
        f"data.files={path}: line {number} is broken ({reason}); correct it, or set data.broken_lines=skip"
    )


def text_field(record: dict[str, Any], field: str, path: str) -> str:
    """Return a record's text; a null is an empty text.

    Raises:
        MissingFieldError: the record lacks the field; the error lists its fields.
        ValueError: the field has a value that is not text.
    """
    if field not in record:
        present = ", ".join(map(str, record))
        raise MissingFieldError(
            f"data.field={field}: not in {path}; its fields are {present}{did_you_mean(field, record)}"
        )
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"field {field} holds {type(text).__name__}, not text")
    return text


def read_table(path: str, *, field: str) -> Iterator[str]:
    """Yield one column of a csv, tsv, parquet or arrow file, or one field of an array of objects in a json file.

    Every cell of a csv or tsv file is text: "NA", "null" and digits too.
    """
    builder = TABLES[format_of(path)]
    try:
        for record in _json_array(path) if builder == "json" else _table(path, builder, field):
            yield text_field(record, field, path)
    except DataError:
        raise
    except Exception as error:  # each format has its own parser with its own errors
        cause = error.__cause__ or error
        raise DataError(f"data.files={path}: cannot be read as {builder} ({cause}); correct or exclude it") from error


def _table(path: str, builder: str, field: str) -> Iterator[dict[str, Any]]:
    import datasets

    options = csv_options(field) if builder == "csv" else {}
    options |= {"sep": "\t"} if format_of(path) == ".tsv" else {}
    datasets.disable_progress_bars()
    for record in datasets.load_dataset(builder, data_files=[path], split="train", streaming=True, **options):
        yield dict(record)


def _json_array(path: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a json file: `datasets` would turn text such as "2020-01-01 00:00:00" into dates."""
    with open_binary(path) as file:
        records = json.load(file)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("not an array of objects")
    yield from records


def csv_options(field: str) -> dict[str, Any]:
    """Return settings of the csv builder of `datasets` with which every cell of the column is text."""
    return {"na_filter": False, "converters": {field: str}}


def is_json_lines(path: str) -> bool:
    """Return whether a `.json` file holds one object per line rather than one array or object."""
    with open_binary(path) as file:
        line = file.readline()
        try:
            return isinstance(json.loads(line), dict) and bool(file.readline(1))
        except (ValueError, RecursionError):
            return False


def _line_number(path: str, offset: int) -> int:
    number = 1
    with open_binary(path) as file:
        while offset > 0:
            block = file.read(min(offset, 1 << 20))
            number += block.count(b"\n")
            offset -= len(block)
    return number
