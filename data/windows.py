"""Reads the windows of a token stream as batches."""

import numpy as np
from torch.utils.data import Dataset

from data.packing import pack
from data.tokens import TokenStream
from llm.contracts import Batch
from llm.errors import DataError

SCANNED_AT_ONCE = 1 << 22
"""Tokens read at a time where documents are counted."""


class WindowDataset(Dataset):
    """The windows of a token stream: window n is ids n * context_length .. (n + 1) * context_length, both included.

    Args:
        stream: the tokens.
        context_length: tokens per window.
        bos_id: the id that begins each document.
        unscored_bit: bit of an id that carries no loss as a label, or 0 where all do.
        vocab_size: number of ids; a larger id is an error when its window is read.

    Raises:
        DataError: a window has an id outside the vocabulary.
    """

    def __init__(self, stream: TokenStream, *, context_length: int, bos_id: int, unscored_bit: int, vocab_size: int):
        self.stream, self.vocab_size = stream, vocab_size
        self.context_length = context_length
        self.bos_id = bos_id
        self.unscored_bit = unscored_bit

    def __len__(self) -> int:
        return max(len(self.stream) - 1, 0) // self.context_length

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a whole micro-batch; the loader calls this once for all its windows."""
        windows = np.empty((len(indices), self.context_length + 1), np.int64)
        for row, index in zip(windows, indices, strict=True):
            start = index * self.context_length
            row[:] = self.stream.read(start, start + self.context_length + 1)
        if (windows & ~self.unscored_bit).max(initial=0) >= self.vocab_size:
            self._refuse(windows & ~self.unscored_bit, indices)
        return pack(windows, bos_id=self.bos_id, unscored_bit=self.unscored_bit)

    def _refuse(self, windows: np.ndarray, indices: list[int]) -> None:
        """Raise DataError for the first id outside the vocabulary, with its place."""
        row, column = np.argwhere(windows >= self.vocab_size)[0]
        path, offset = self.stream.place(indices[row] * self.context_length + int(column))
        raise DataError(
            f"loader.cache_dir={path}: token {windows[row, column]} at byte {offset} is outside the vocabulary of "
            f"{self.vocab_size}: the file is corrupt; delete this cache, and it is built again"
        )

    def documents_in(self, windows: list[int]) -> list[tuple[int, int]]:
        """Return the numbers of the first and the last document in each window, counted from 0.

        Reads the stream up to the last of the windows, which takes seconds for billions of tokens.
        """
        length = self.context_length
        ends = sorted({edge for window in windows for edge in (window * length + 1, (window + 1) * length)})
        begun, at, count = {0: 0}, 0, 0
        for end in ends:
            while at < end:
                part = self.stream.read(at, min(end, at + SCANNED_AT_ONCE))
                ids = part & ~part.dtype.type(self.unscored_bit) if self.unscored_bit else part
                count, at = count + int((ids == self.bos_id).sum()), at + len(part)
            begun[end] = count
        spans = [(begun[w * length + 1], begun[(w + 1) * length]) for w in windows]
        return [(max(first - 1, 0), max(last - 1, 0)) for first, last in spans]
