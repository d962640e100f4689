"""What a raw document must be to become training text, and which side of the validation split it falls on."""

import hashlib
from collections import Counter
from typing import NamedTuple

import numpy as np

DIGEST_BYTES = 16  # 128 bits: among 1e9 documents two different ones collide with probability 1e-21


class Document(NamedTuple):
    """Clean text with the digest of its UTF-8 bytes."""

    text: str
    num_bytes: int
    digest: bytes


class ScoredText(NamedTuple):
    """ASCII text of which only some bytes carry loss; needs a tokenizer with one token a byte."""

    data: bytes
    is_scored: np.ndarray
    """One bool a byte: whether the prediction of this byte is scored."""


class Cleaner:
    """Turns raw documents into clean ones and counts what it left out.

    - bytes that are not UTF-8: the document is dropped, counted in `invalid_utf8`; so is text holding lone surrogates;
    - a line longer than `max_line_bytes`, which marks minified code and data: dropped, counted in `long_lines`;
    - nothing but white space: dropped, counted in `empty`.

    Args:
        max_line_bytes: Longest line allowed, in bytes with its line end; None allows any.
    """

    def __init__(self, *, max_line_bytes: int | None):
        self.max_line_bytes = max_line_bytes
        self.counts: Counter[str] = Counter()

    def __call__(self, raw: str | bytes) -> Document | None:
        """Return the clean document, or None when nothing of it is left."""
        try:
            text, data = _both_forms(raw)
        except UnicodeError:
            self.counts["invalid_utf8"] += 1
            return None
        if self.max_line_bytes is not None and _longest_line(data, self.max_line_bytes) > self.max_line_bytes:
            self.counts["long_lines"] += 1
            return None
        if not text or text.isspace():
            self.counts["empty"] += 1
            return None
        self.counts["documents"] += 1
        self.counts["bytes"] += len(data)
        return Document(text, len(data), digest(data))


def _both_forms(raw: str | bytes) -> tuple[str, bytes]:
    if isinstance(raw, str):
        return raw, raw.encode("utf-8")
    data = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is no text
    return data.decode("utf-8"), data


def _longest_line(data: bytes, limit: int) -> int:
    if len(data) <= limit:  # most documents are shorter than the longest line allowed
        return len(data)
    return max(map(len, data.split(b"\n"))) + 1


def digest(data: bytes) -> bytes:
    """Return 16 bytes that name the content."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def is_validation(document_digest: bytes, val_fraction: float) -> bool:
    """Say whether a document belongs to the validation split.

    A document's side depends on its content alone: copies fall on the same side, and adding documents moves none.
    The first eight bytes of the digest, read as a fraction in [0, 1), are compared with `val_fraction`.
    """
    return int.from_bytes(document_digest[:8], "big") < val_fraction * 2**64
