"""Refuses a corpus without a whole window, and says which reason discarded most of it."""

from data.cache_builder import CacheOptions
from data.cleaning_report import describe_discarded, remedy_for
from data.sources import Source
from data.token_cache import TokenCache
from llm.errors import DataError


def refuse_too_few(
    cache: TokenCache, source: Source, options: CacheOptions, *, context_length: int, is_training: bool
) -> None:
    """Raise DataError where a split that is read has no whole window."""
    needed = context_length + 1
    found = describe_discarded(cache.report)
    if is_training and len(cache.train) < needed:
        remedy = remedy_for(cache.report, f"{source.hint()}, or lower context_length")
        raise DataError(
            f"context_length={context_length}: one window needs {needed} tokens, the training split has "
            f"{len(cache.train)} ({found}); {remedy}"
        )
    if len(cache.val) < needed:
        own = source.validation
        key = f"loader.val_fraction={options.val_fraction}" if own is None else "data: the validation set is too small"
        otherwise = f"raise loader.val_fraction, or {source.hint()}" if own is None else own.hint()
        raise DataError(
            f"{key}: the validation split has {len(cache.val)} tokens, one window needs {needed} ({found}); "
            f"{remedy_for(cache.report, otherwise)}"
        )
