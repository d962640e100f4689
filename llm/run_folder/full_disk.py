"""Recognizes a full disk among the errors that different writers raise for it."""

import errno

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = ("no space left", "quota exceeded", "file too large", "os error 28", "os error 27", "os error 122")


def is_full_disk(error: BaseException) -> bool:
    """Return whether a full disk or quota caused an error.

    Python raises OSError. safetensors and torch raise errors of their own, which name the cause in their text alone.
    """
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in _FULL:
            return True
        if any(words in str(chain).lower() for words in _FULL_WORDS):
            return True
        chain = chain.__cause__ or chain.__context__
    return False
