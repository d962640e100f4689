"""The key/value cache, which attention over stored keys uses for decoding."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import PositionView
from llm.errors import ShapeError


class KeyValueCache:
    """A cache of the keys of each position view, the values and the document ids of all tokens seen.

    A view's key depends on its own position alone, so it is stored as the view returns it and never rotated again.
    Buffers are allocated at the first call, when the number of views and the head sizes are known.

    Args:
        batch: number of rows.
        max_length: largest number of tokens.
        device: device of the buffers.
        dtype: dtype of keys and values.
    """

    def __init__(self, *, batch: int, max_length: int, device: torch.device, dtype: torch.dtype) -> None:
        self.batch, self.max_length, self.device, self.dtype = batch, max_length, device, dtype
        self._length = 0
        self._keys: list[Tensor] = []
        self._values: Tensor | None = None
        self._document_ids = torch.zeros(batch, max_length, dtype=torch.long, device=device)
        self._is_one_document = True

    @property
    def length(self) -> int:
        """Number of tokens seen so far."""
        return self._length

    def append(
        self,
        views: tuple[PositionView, ...],
        v: Float[Tensor, "batch time kv_heads value_dim"] | None,
        document_ids: Int[Tensor, "batch time"] | None,
    ) -> tuple[tuple[PositionView, ...], Tensor | None, Tensor | None]:
        """Store the new tokens; return views, values and document ids that cover all tokens seen.

        The ids are None while no call has passed any: every row is one document. Values are None where the keys of
        the first view are the values.

        Raises:
            ShapeError: the cache would exceed max_length tokens.
        """
        start, end = self._length, self._length + views[0].k.shape[1]
        if end > self.max_length:
            raise ShapeError(f"cache length={end}: exceeds max_length={self.max_length}; allocate a longer cache")
        if not self._keys:
            self._keys = [self._buffer(view.k) for view in views]
            self._values = None if v is None else self._buffer(v)
        for keys, view in zip(self._keys, views, strict=True):
            keys[:, start:end] = view.k
        if v is not None and self._values is not None:
            self._values[:, start:end] = v
        if document_ids is not None:
            self._is_one_document = False
            self._document_ids[:, start:end] = document_ids
        self._length = end
        whole = tuple(view._replace(k=keys[:, :end]) for keys, view in zip(self._keys, views, strict=True))
        values = None if self._values is None else self._values[:, :end]
        return whole, values, None if self._is_one_document else self._document_ids[:, :end]

    def _buffer(self, like: Tensor) -> Tensor:
        return torch.zeros(self.batch, self.max_length, *like.shape[2:], dtype=self.dtype, device=self.device)

    def reorder(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep the given rows, in this order."""
        self._keys = [keys[rows] for keys in self._keys]
        self._values = None if self._values is None else self._values[rows]
        self._document_ids = self._document_ids[rows]
        self.batch = len(rows)

    def rewind(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self._length = min(length, self._length)

    def nbytes(self) -> int:
        """Return the bytes of all buffers."""
        tensors = [*self._keys, self._document_ids, *([] if self._values is None else [self._values])]
        return sum(t.numel() * t.element_size() for t in tensors)
