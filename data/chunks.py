"""Cuts one long text into documents: at line ends, and inside lines that are too long for a document."""

import io
from collections.abc import Iterator

_SHORT_LOOK = 4096
"""Bytes in which nearly every line ends; more are read only where none ends there."""
_LEAST_LOOK, _MOST_LOOK = 1 << 10, 1 << 16
_LONGEST_PART = 1 << 15
"""Most bytes of a part of a long line: far enough below `loader.max_line_bytes` that no part is discarded."""


def read_chunks(file: io.BufferedIOBase, *, size: int, first: int = 0, last: int | None = None) -> Iterator[bytes]:
    """Cut a file into documents of about `size` bytes; yield those numbered first..last-1.

    Document k ends with the line that holds byte (k + 1) * size - 1. Where that line continues for more than about
    4 * size bytes, the document ends at the next space instead. Both depend on the file alone, so any range of
    documents can be read alone. The parts of a long line are cut again where they are longer than 32 KiB.
    """
    look = min(max(4 * size, _LEAST_LOOK), _MOST_LOOK)
    text = _Ahead(file, start=first * size - 1 if first else 0)
    is_inside_line = False
    if first:
        end, is_inside_line = _end_of_document(text, 1, size=size, look=look)
        text.take(end)
    k = first
    while last is None or k < last:
        k += 1
        boundary = k * size - text.position
        if boundary <= 0:  # an earlier document reached beyond this one
            continue
        if text.available(boundary) == 0:
            return
        end, ends_inside_line = _end_of_document(text, boundary, size=size, look=look)
        chunk = text.take(end)
        yield from _parts(chunk) if is_inside_line or ends_inside_line else (chunk,)
        is_inside_line = ends_inside_line


class _Ahead:
    """A file that is read from one position on, and whose next bytes can be read in advance."""

    def __init__(self, file: io.BufferedIOBase, *, start: int):
        self._file, self.position = file, start
        self.bytes = b""
        if start:
            file.seek(start)

    def available(self, count: int) -> int:
        """Read ahead until `count` bytes are buffered; return their number, which is smaller only at the file's end."""
        if len(self.bytes) < count:
            self.bytes += self._file.read(count - len(self.bytes))
        return min(len(self.bytes), count)

    def take(self, count: int) -> bytes:
        """Return the next bytes and move behind them."""
        taken, self.bytes = self.bytes[:count], self.bytes[count:]
        self.position += len(taken)
        return taken


def _end_of_document(text: _Ahead, boundary: int, *, size: int, look: int) -> tuple[int, bool]:
    """Return where the document ends that holds the byte before `boundary`, and whether that is inside a line."""
    for reach in (min(look, _SHORT_LOOK), look):
        found = text.available(boundary + reach)
        end = text.bytes.find(b"\n", boundary - 1, boundary + reach)
        if end >= 0:
            return end + 1, False
        if found < boundary + reach:
            return found, False
    return _cut(text.bytes, boundary, min(size, _LEAST_LOOK)), True


def _cut(data: bytes, near: int, reach: int) -> int:
    """Return the first place after `near` that follows a space, or else one between two characters of UTF-8."""
    end = data.find(b" ", near, near + reach)
    if end >= 0:
        return end + 1
    while near < len(data) and data[near] & 0xC0 == 0x80:
        near += 1
    return near


def _parts(chunk: bytes) -> Iterator[bytes]:
    """Cut a part of a long line into equal parts of at most about 32 KiB."""
    count = -(-len(chunk) // _LONGEST_PART)
    start = 0
    for number in range(1, count + 1):
        end = len(chunk) if number == count else _cut(chunk, number * len(chunk) // count, _LEAST_LOOK)
        yield chunk[start:end]
        start = end
