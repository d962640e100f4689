import numpy as np
import pytest

from data.cleaning import Cleaner, digest, is_validation


@pytest.mark.parametrize(
    ("raw", "reason"),
    [(b"", "empty"), (" \n\t\u00a0", "empty"), (b"caf\xe9", "invalid_utf8"), ("\ud800", "invalid_utf8")],
)
def test_a_document_that_is_not_text_is_discarded_and_counted(raw, reason):
    cleaner = Cleaner(max_line_bytes=None)
    assert cleaner(raw) is None
    assert cleaner.counts == {reason: 1}


def test_a_document_with_a_too_long_line_is_discarded_and_counted():
    cleaner = Cleaner(max_line_bytes=10)
    assert cleaner("0123456789\n") is None
    assert cleaner("short\n" + "é" * 6) is None  # 12 bytes, 6 characters
    assert cleaner("012345678\n" * 5) is not None
    assert cleaner.counts == {"long_lines": 2, "documents": 1, "bytes": 50}


def test_bytes_and_text_of_one_document_are_the_same_document():
    cleaner = Cleaner(max_line_bytes=None)
    assert cleaner("naïve") == cleaner("naïve".encode()) == cleaner(b"\xef\xbb\xbf" + "naïve".encode())


def test_the_share_of_validation_documents_is_val_fraction():
    sides = [is_validation(digest(f"{i}".encode()), 0.05) for i in range(20_000)]
    assert abs(np.mean(sides) - 0.05) < 5 * np.sqrt(0.05 * 0.95 / 20_000)  # five standard errors


def test_a_larger_share_keeps_the_documents_of_a_smaller_one():
    names = [digest(f"{i}".encode()) for i in range(1000)]
    assert all(is_validation(name, 0.3) for name in names if is_validation(name, 0.1))
