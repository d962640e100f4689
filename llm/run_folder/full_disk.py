"""Recognizes a full disk and a file-size limit among the errors that different writers raise for them."""

import errno

_FULL = ({errno.ENOSPC, errno.EDQUOT}, ("no space left", "quota exceeded", "os error 28", "os error 122"))
_LIMIT = ({errno.EFBIG}, ("file too large", "os error 27"))

FULL = "the disk or quota is full"
LIMIT = "the file-size limit of this process is reached (`ulimit -f` shows it)"
REMEDY = {FULL: "free space", LIMIT: "raise the limit with `ulimit -f unlimited`"}
"""What a user can do, per cause."""


def refusal_cause(error: BaseException) -> str | None:
    """Return `FULL` or `LIMIT` where one of them caused an error, else None.

    Python raises OSError. safetensors and torch raise errors of their own, which name the cause in their text alone.
    """
    chain: BaseException | None = error
    while chain is not None:
        for cause, (numbers, words) in ((FULL, _FULL), (LIMIT, _LIMIT)):
            if isinstance(chain, OSError) and chain.errno in numbers:
                return cause
            if any(word in str(chain).lower() for word in words):
                return cause
        chain = chain.__cause__ or chain.__context__
    return None
