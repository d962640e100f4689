"""The decoding cache of Transformer-VQ: counted codes and a few blocks of keys."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm.contracts import PositionView
from llm.model.attention.vq_blocks import attend_codes, sum_by_code


class VQCache:
    """A cache of the last one to three blocks of keys, and of the count and mean value of each code before them.

    Values are stored as means, not as sums, so that their precision does not fall with the length.

    Args:
        batch: number of rows.
        block_size: tokens that move into the counts at a time.
        codebook_size: codes per head.
        device: device of the tensors.
    """

    def __init__(self, *, batch: int, block_size: int, codebook_size: int, device: torch.device) -> None:
        self.block_size, self.codebook_size = block_size, codebook_size
        self._length = 0
        self._keys: list[Tensor] = []
        self._near: dict[str, Tensor] = {}
        self._counts: Tensor | None = None
        self._means: Tensor | None = None
        self._state_ids = torch.full((batch,), torch.iinfo(torch.long).min, device=device)

    @property
    def length(self) -> int:
        """Number of tokens seen so far."""
        return self._length

    def attend(
        self,
        views: tuple[PositionView, ...],
        v: Float[Tensor, "batch time kv_heads value_dim"],
        code_ids: Int[Tensor, "batch time kv_heads"],
        document_ids: Int[Tensor, "batch time"],
        *,
        codes: Float[Tensor, "kv_heads codes head_dim"],
        scale: float,
    ) -> Float[Tensor, "batch time heads value_dim"]:
        """Store new tokens and return their attention to all tokens seen."""
        mixed = []
        for start in range(0, v.shape[1], self.block_size):
            part = slice(start, start + self.block_size)
            some = tuple(view._replace(q=view.q[:, part], k=view.k[:, part]) for view in views)
            self._append(some, {"values": v[:, part], "code_ids": code_ids[:, part], "ids": document_ids[:, part]})
            whole = tuple(view._replace(k=keys) for view, keys in zip(some, self._keys, strict=True))
            assert self._counts is not None
            assert self._means is not None
            mixed.append(
                attend_codes(
                    whole,
                    self._near["values"],
                    self._near["ids"],
                    codes=codes,
                    counts=self._counts,
                    means=self._means,
                    state_ids=self._state_ids,
                    scale=scale,
                )
            )
            if self._near["ids"].shape[1] >= 2 * self.block_size:
                self._count_oldest_block()
        return torch.cat(mixed, dim=1)

    def _append(self, views: tuple[PositionView, ...], new: dict[str, Tensor]) -> None:
        if self._counts is None:
            batch, _, heads, dim = new["values"].shape
            options = {"dtype": torch.float32, "device": new["values"].device}
            self._counts = torch.zeros(batch, heads, self.codebook_size, **options)
            self._means = torch.zeros(batch, heads, self.codebook_size, dim, **options)
            self._keys, self._near = [view.k for view in views], new
        else:
            self._keys = [torch.cat((old, view.k), 1) for old, view in zip(self._keys, views, strict=True)]
            self._near = {name: torch.cat((old, new[name]), 1) for name, old in self._near.items()}
        self._length += new["ids"].shape[1]

    def _count_oldest_block(self) -> None:
        """Move the oldest block from keys into counts and means of the document that ends it."""
        assert self._counts is not None
        assert self._means is not None
        oldest = {name: x[:, : self.block_size] for name, x in self._near.items()}
        last = oldest["ids"][:, -1]
        is_carried = (oldest["ids"] == last[:, None])[..., None, None]
        values = torch.where(is_carried, oldest["values"].float(), 0.0)
        sums = sum_by_code(values, oldest["code_ids"], self.codebook_size)
        added = sum_by_code(is_carried.expand_as(values[..., :1]).float(), oldest["code_ids"], self.codebook_size)
        kept = torch.where((self._state_ids == last)[:, None, None], self._counts, 0.0)
        self._counts = kept + added[..., 0]
        means = torch.where(kept[..., None] > 0, self._means, 0.0)
        self._means = means + (sums - added * means) / self._counts.clamp_min(1.0)[..., None]
        self._state_ids = last
        self._keys = [keys[:, self.block_size :] for keys in self._keys]
        self._near = {name: x[:, self.block_size :] for name, x in self._near.items()}

    def _tensors(self) -> list[Tensor]:
        states = [x for x in (self._counts, self._means) if x is not None]
        return [*self._keys, *self._near.values(), *states, self._state_ids]

    def reorder(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep the given rows, in this order."""
        self._keys = [keys[rows] for keys in self._keys]
        self._near = {name: x[rows] for name, x in self._near.items()}
        self._counts = None if self._counts is None else self._counts[rows]
        self._means = None if self._means is None else self._means[rows]
        self._state_ids = self._state_ids[rows]

    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in self._tensors())
