"""Writes and reads token shards: files with a header and ids, read as one long stream through memory maps."""

import bisect
import itertools
import os
import struct
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from llm.errors import DataError

_MAGIC = b"CRUCTOK1"
_HEADER = struct.Struct("<8sII")  # magic, bytes per id, reserved; the count follows
_COUNT = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _COUNT.size
_OPEN_SHARDS = 256  # each map needs a file descriptor, and a process often has 1024


class ShardWriter:
    """A writer of one shard. The count in the header stays 0 until `close`, which identifies an incomplete shard."""

    def __init__(self, path: str | Path, dtype: np.dtype):
        self.dtype = dtype
        self.count = 0
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._file.write(_HEADER.pack(_MAGIC, dtype.itemsize, 0) + _COUNT.pack(0))

    def write(self, ids: np.ndarray) -> None:
        """Append ids, which must fit the shard's type."""
        self._file.write(np.ascontiguousarray(ids, self.dtype).data.cast("B"))
        self.count += len(ids)

    def close(self) -> None:
        """Write the count and flush to the disk."""
        with self._file as file:
            file.seek(_HEADER.size)
            file.write(_COUNT.pack(self.count))
            file.flush()
            os.fsync(file.fileno())

    def abandon(self) -> None:
        """Close the file without its count."""
        self._file.close()


def check_shard(path: Path, *, dtype: np.dtype, count: int) -> None:
    """Raise DataError unless the header and the size of the file correspond to `count` ids of `dtype`."""
    expected = HEADER_BYTES + count * dtype.itemsize
    try:
        with open(path, "rb") as file:
            header = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"loader.cache_dir={path}: cannot be read ({error}); delete this cache") from error
    if header != _HEADER.pack(_MAGIC, dtype.itemsize, 0) + _COUNT.pack(count) or size != expected:
        raise DataError(f"loader.cache_dir={path}: corrupt ({size} bytes, {expected} expected); delete this cache")


class TokenStream:
    """A sequence of shards that is read as one sequence of ids; a pickled stream contains paths only.

    Args:
        shards: path and number of ids of each shard, in order.
        dtype: type of the ids.
    """

    def __init__(self, shards: Sequence[tuple[Path, int]], dtype: np.dtype):
        self.paths = [path for path, _ in shards]
        self.ends = list(itertools.accumulate(count for _, count in shards))
        self.dtype = dtype
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": OrderedDict()}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return ids start..stop-1: a view of the memory map, or a copy where the range spans shards."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start}..{stop} of {len(self)}")
        index = bisect.bisect_right(self.ends, start)
        parts = []
        while start < stop:
            first = self.ends[index - 1] if index else 0
            end = min(stop, self.ends[index])
            parts.append(self._map(index)[start - first : end - first])
            start, index = end, index + 1
        if not parts:
            return np.empty(0, self.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def place(self, number: int) -> tuple[Path, int]:
        """Return the shard that holds a token, and the byte where it begins."""
        index = bisect.bisect_right(self.ends, number)
        before = self.ends[index - 1] if index else 0
        return self.paths[index], HEADER_BYTES + (number - before) * self.dtype.itemsize

    def _map(self, index: int) -> np.ndarray:
        found = self._maps.get(index)
        if found is None:
            found = self._maps[index] = map_shard(self.paths[index], self.dtype)
            if len(self._maps) > _OPEN_SHARDS:
                self._maps.popitem(last=False)
        else:
            self._maps.move_to_end(index)
        return found


def map_shard(path: Path, dtype: np.dtype) -> np.ndarray:
    """Return the ids of a shard as a read-only memory map."""
    return np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES).view(np.ndarray)
