"""Cleans raw documents, and decides which of them belong to the validation split."""

import hashlib
from collections import Counter
from typing import NamedTuple

import numpy as np

DIGEST_BYTES = 16  # 128 bits: among 1e9 documents two different ones collide with probability 1e-21


class Document(NamedTuple):
    """A clean text with the size and the digest of its UTF-8 bytes."""

    text: str
    num_bytes: int
    digest: bytes


class ScoredText(NamedTuple):
    """An ASCII text of which only some bytes carry loss; it needs a tokenizer with one token per byte."""

    data: bytes
    is_scored: np.ndarray
    """One bool per byte: whether the prediction of this byte is scored."""

    @property
    def num_bytes(self) -> int:
        """Number of bytes."""
        return len(self.data)


class Cleaner:
    """A filter that turns raw documents into clean ones and counts those that it discards.

    - Bytes or surrogates that are not valid UTF-8: the document is counted in `invalid_utf8`.
    - A line longer than `max_line_bytes`, which is typical of minified code and data: counted in `long_lines`.
    - White space alone: counted in `empty`.

    Args:
        max_line_bytes: the longest line allowed, in bytes with its line end; None allows any.
    """

    def __init__(self, *, max_line_bytes: int | None):
        self.max_line_bytes = max_line_bytes
        self.counts: Counter[str] = Counter()

    def __call__(self, raw: str | bytes | ScoredText) -> Document | ScoredText | None:
        """Return the clean document, or None where it is discarded. Scored text is clean as it is."""
        document = raw if isinstance(raw, ScoredText) else self._clean(raw)
        if document is not None:
            self.counts.update(documents=1, bytes=document.num_bytes)
        return document

    def discard(self, document: Document | ScoredText, reason: str) -> None:
        """Count a clean document under a reason to discard it."""
        self.counts.update({reason: 1, "documents": -1, "bytes": -document.num_bytes})

    def _clean(self, raw: str | bytes) -> Document | None:
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
        return Document(text, len(data), digest(data))


def _both_forms(raw: str | bytes) -> tuple[str, bytes]:
    if isinstance(raw, str):
        return raw, raw.encode("utf-8")
    data = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is not text
    return data.decode("utf-8"), data


def _longest_line(data: bytes, limit: int) -> int:
    if len(data) <= limit:  # most documents are shorter than the longest line allowed
        return len(data)
    return max(map(len, data.split(b"\n"))) + 1


def digest(data: bytes) -> bytes:
    """Return 16 bytes that name the content."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def digest_of(document: Document | ScoredText) -> bytes:
    """Return the digest of a clean document."""
    return document.digest if isinstance(document, Document) else digest(document.data)


def is_validation(document_digest: bytes, val_fraction: float) -> bool:
    """Return whether a document belongs to the validation split.

    The content of a document alone decides. Copies therefore fall on the same side, and adding documents moves none.
    The first eight bytes of the digest, read as a fraction in [0, 1), are compared with `val_fraction`.
    """
    return int.from_bytes(document_digest[:8], "big") < val_fraction * 2**64
