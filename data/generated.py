"""Defines generated corpora, whose documents are a pure function of their settings and numbers."""

import copy
from collections import Counter
from collections.abc import Iterator

from data.sources import Piece, RawDocument, hash_settings
from llm.errors import ConfigError

FIRST_VALIDATION = 1 << 40
"""Number of the first document of a generated validation set, whatever the number of training documents."""

NUM_PIECES = 16
"""Number of ranges of documents that worker processes read."""


class GeneratedCorpus:
    """A corpus of generated documents, each a pure function of the settings and of its number."""

    is_scored = False
    num_documents: int
    num_val_documents: int | None
    document_bytes: int
    first_number = 0

    def settings(self) -> list[object]:
        """Return the settings that determine the text."""
        raise NotImplementedError

    def document(self, number: int) -> RawDocument:
        """Return one document."""
        raise NotImplementedError

    @property
    def validation(self) -> "GeneratedCorpus | None":
        """See Source."""
        if self.num_val_documents is None:
            return None
        own = copy.copy(self)
        own.num_documents, own.num_val_documents, own.first_number = self.num_val_documents, None, FIRST_VALIDATION
        return own

    def fingerprint(self) -> str:
        """See Source."""
        return hash_settings([*self.settings(), *([self.first_number] if self.first_number else [])])

    def pieces(self) -> list[Piece]:
        """See Source."""
        step = max(-(-self.num_documents // NUM_PIECES), 1)
        starts = range(0, self.num_documents, step)
        ranges = [(start, min(start + step, self.num_documents)) for start in starts]
        return [Piece((), start, stop, (stop - start) * self.document_bytes) for start, stop in ranges]

    def read(self, piece: Piece, counts: Counter[str]) -> Iterator[RawDocument]:
        """See Source."""
        for number in range(piece.start, piece.stop or 0):
            yield self.document(self.first_number + number)

    def hint(self) -> str:
        """See Source."""
        return "raise data.num_documents"


def check_val_documents(num_val_documents: int | None) -> None:
    """Raise ConfigError for a validation set without a document."""
    if num_val_documents is not None and num_val_documents < 1:
        raise ConfigError(
            f"data.num_val_documents={num_val_documents}: must be at least 1; or null to hold out loader.val_fraction"
        )
