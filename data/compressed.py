"""Opens plain and compressed files for reading bytes, and names those that are truncated or corrupt."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator

from llm.errors import DataError

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_LARGEST_WINDOW = 1 << 27
"""Bytes of the largest window that pyarrow's zstd decompresses; `zstd --long=31` writes 2 GiB."""


def compression_of(path: str) -> str:
    """Return the ending that names a file's compression, or an empty string."""
    return next((ending for ending in COMPRESSED if path.lower().endswith(ending)), "")


def open_binary(path: str) -> io.BufferedIOBase:
    """Open a file for reading bytes, decompressed as its ending says (gz, bz2, xz, zst).

    Raises:
        DataError: a zst file needs a window that only the package zstandard decompresses.
    """
    compression = compression_of(path)
    if compression == ".gz":
        return gzip.GzipFile(path)
    if compression == ".bz2":
        return bz2.BZ2File(path)
    if compression == ".xz":
        return lzma.LZMAFile(path)
    if compression == ".zst":
        return _open_zstd(path)
    return open(path, "rb")


def _open_zstd(path: str) -> io.BufferedIOBase:
    window = _zstd_window(path)
    if window <= _ZSTD_LARGEST_WINDOW:
        import pyarrow  # it contains zstandard, which the standard library lacks before Python 3.14

        return io.BufferedReader(pyarrow.CompressedInputStream(path, "zstd"))  # pyright: ignore[reportArgumentType]
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"data.files={path}: is compressed with a window of {window >> 20} MiB (zstd --long); "
            f"pip install zstandard, or decompress it with zstd -d --long={window.bit_length() - 1}"
        ) from error
    return io.BufferedReader(zstandard.ZstdDecompressor(max_window_size=window).stream_reader(open(path, "rb")))


def _zstd_window(path: str) -> int:
    """Return the window size of the first frame of a zst file, in bytes, from its header (RFC 8878, section 3.1.1)."""
    with open(path, "rb") as file:
        header = file.read(18)
    if len(header) < 6 or header[:4] != _ZSTD_MAGIC:
        return 0  # the decompressor reports the error
    descriptor = header[4]
    if not descriptor & 0x20:
        base = 1 << (10 + (header[5] >> 3))
        return base + (base >> 3) * (header[5] & 7)
    start = 5 + (0, 1, 2, 4)[descriptor & 3]  # a single segment: its window is its content
    size = (1, 2, 4, 8)[descriptor >> 6]
    return int.from_bytes(header[start : start + size], "little")


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Turn the errors of reading a file, also of a truncated or corrupt one, into a DataError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        state = (
            "cannot be read; it is truncated, corrupt or has a wrong ending"
            if compression_of(path)
            else "cannot be read"
        )
        raise DataError(f"data.files={path}: {state} ({error}); replace the file, or exclude it") from error
