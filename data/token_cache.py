"""Opens the token cache of a corpus, and builds it where it does not exist yet."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from data.cache_builder import MANIFEST, CacheOptions, build_cache
from data.cleaning_report import warnings_of
from data.sources import Source, hash_settings
from data.tokens import TokenStream, check_shard
from data.worker import SPLITS, explain_disk_error
from llm.errors import ConfigError, DataError

CACHE_VERSION = 2
"""Increase it with every change to cleaning, splitting, tokenising or the shards, so that old caches stay unused."""
_logger = logging.getLogger(__name__)


class TokenCache(NamedTuple):
    """A published corpus, ready to read."""

    train: TokenStream
    val: TokenStream
    fingerprint: str
    unscored_bit: int
    """In a scored corpus, the bit of an id that carries no loss as a label; otherwise 0."""
    report: Mapping[str, Any]
    """Counts of the cleaning; see `data.cleaning_report`."""


def default_cache_dir() -> Path:
    """Return `$CRUCIBLE_CACHE`, or the `crucible` folder of the user's cache."""
    if folder := os.environ.get("CRUCIBLE_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "crucible"


def open_or_build(source: Source, tokenizer: Any, options: CacheOptions) -> TokenCache:
    """Return the corpus as tokens. Train the tokenizer and build the cache first where they do not exist yet.

    Several processes may call this at once: one builds, the others wait and then read.

    Raises:
        ConfigError: the source scores single bytes, and the tokenizer merges bytes.
        DataError: there is nothing to read, a file is broken, the tokenizer loses more than 5 % of the text, or the
            disk is full or read-only.
    """
    if source.is_scored and not tokenizer.has_one_token_a_byte:
        raise ConfigError("tokenizer: this synthetic source scores single bytes; set tokenizer=bytes")
    cache = _find_or_build(source, tokenizer, options)
    for warning in warnings_of(cache.report):
        _logger.warning("%s", warning)
    return cache


def _find_or_build(source: Source, tokenizer: Any, options: CacheOptions) -> TokenCache:
    corpus = [CACHE_VERSION, source.fingerprint(), options.val_fraction, options.deduplicate, options.max_line_bytes]
    if source.validation is not None:
        corpus.append(source.validation.fingerprint())
    key = hash_settings([corpus, tokenizer.settings()])
    final = options.cache_dir / "tokens" / key
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if (found := _open(final, tokenizer)) is not None:
            return found
        with FileLock(final.with_name(f".{key}.lock")):
            if (found := _open(final, tokenizer)) is not None:
                return found
            build_cache(source, tokenizer, options, final, hash_settings([corpus, "tokenizer", tokenizer.settings()]))
    except OSError as error:
        raise explain_disk_error(error, options.cache_dir) from error
    opened = _open(final, tokenizer)
    if opened is None:
        raise DataError(f"loader.cache_dir={final}: it was removed during its construction; start again")
    return opened


def _open(folder: Path, tokenizer: Any) -> TokenCache | None:
    """Open a published corpus. Return None where there is none, or where it is corrupt and must be built again."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        _logger.warning("loader.cache_dir=%s: the manifest is corrupt (%s); the cache is built again", folder, error)
        return None
    dtype = np.dtype(manifest["dtype"])
    streams = {}
    try:
        for split in SPLITS:
            shards = [(folder / name, count) for name, count in manifest[split]]
            for path, count in shards:
                check_shard(path, dtype=dtype, count=count)
            streams[split] = TokenStream(shards, dtype)
    except DataError as error:
        _logger.warning("%s; it is built again", error)
        return None
    if not tokenizer.is_trained:
        tokenizer.load((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if tokenizer.fingerprint() != manifest["tokenizer"]:
        raise DataError(f"loader.cache_dir={folder}: its tokens were made by another tokenizer; delete this cache")
    return TokenCache(streams["train"], streams["val"], folder.name, manifest["unscored_bit"], manifest["report"])
