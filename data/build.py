"""Builds the token cache: cleans, tokenises in parallel, removes duplicates, and publishes a whole folder at once."""

import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from data.cleaning import Cleaner, Document, is_validation
from data.duplicates import remove_duplicates
from data.pool import tokenize
from data.sources import Source, hash_settings
from data.tokens import TokenStream, check_shard
from data.worker import SPLITS, Job, clean_documents, explain_disk_error, index_name, shard_name, unscored_bit
from llm.errors import ConfigError, DataError

CACHE_VERSION = 1
"""Raise it with every change to cleaning, splitting, tokenising or the layout of shards: old caches are then unused."""
_MANIFEST = "manifest.json"
_FAST_CHECK_DOCUMENTS = 64
_logger = logging.getLogger(__name__)


class TokenCache(NamedTuple):
    """A published corpus, ready to read."""

    train: TokenStream
    val: TokenStream
    fingerprint: str
    unscored_bit: int
    """In a scored corpus, the bit of an id that carries no loss as a label; else 0."""
    report: dict[str, Any]
    """Counts of the cleaning: documents, duplicates, empty, invalid_utf8, long_lines, broken_lines, tokens, seconds."""


class CacheOptions(NamedTuple):
    """How a corpus becomes tokens; see TokenDataModule for the meaning of each."""

    cache_dir: Path
    val_fraction: float
    deduplicate: bool
    max_line_bytes: int | None
    num_processes: int | None


def describe_report(report: dict[str, Any]) -> str:
    """Return what the cleaning kept and left out, in a line."""
    left_out = {
        "duplicates": "duplicates",
        "empty": "empty",
        "invalid_utf8": "not UTF-8",
        "long_lines": "with over-long lines",
        "broken_lines": "broken lines",
    }
    dropped = [f"{report[key]:_} {words}" for key, words in left_out.items() if report.get(key)]
    kept = f"{report['documents']:_} documents, {report['bytes'] / 1e6:.1f} MB, tokenised in {report['seconds']:.1f} s"
    return f"{kept}; left out: {', '.join(dropped) or 'nothing'}"


def default_cache_dir() -> Path:
    """Return `$CRUCIBLE_CACHE`, or the `crucible` folder of the user's cache."""
    if folder := os.environ.get("CRUCIBLE_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "crucible"


def open_or_build(source: Source, tokenizer: Any, options: CacheOptions) -> TokenCache:
    """Return the corpus as tokens, training the tokenizer and building the cache where they are not there yet.

    Several processes may call this at once: one builds, the others wait and then read.

    Raises:
        ConfigError: a scored source with a tokenizer that merges bytes.
        DataError: nothing to read, a broken file, or a disk that is full or read-only.
    """
    if source.is_scored and not tokenizer.has_one_token_a_byte:
        raise ConfigError("tokenizer: this synthetic source scores single bytes; set tokenizer=bytes")
    corpus = [CACHE_VERSION, source.fingerprint(), options.val_fraction, options.deduplicate, options.max_line_bytes]
    key = hash_settings([corpus, tokenizer.settings()])
    final = options.cache_dir / "tokens" / key
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        if (found := _open(final, tokenizer)) is not None:
            return found
        with FileLock(final.with_name(f".{key}.lock")):
            if (found := _open(final, tokenizer)) is not None:
                return found
            _build(source, tokenizer, options, final, hash_settings([corpus, "tokenizer", tokenizer.settings()]))
    except OSError as error:
        raise explain_disk_error(error, options.cache_dir) from error
    opened = _open(final, tokenizer)
    if opened is None:
        raise DataError(f"loader.cache_dir={final}: vanished while being built; start again")
    return opened


def _open(folder: Path, tokenizer: Any) -> TokenCache | None:
    """Open a published corpus; None when there is none, or a damaged one, which is removed."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        _logger.warning("loader.cache_dir=%s: damaged manifest (%s); it is built anew", folder, error)
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
        _logger.warning("%s; it is built anew", error)
        return None
    if not tokenizer.is_trained:
        tokenizer.load((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if tokenizer.fingerprint() != manifest["tokenizer"]:
        raise DataError(f"loader.cache_dir={folder}: its tokens were made by another tokenizer; delete this cache")
    return TokenCache(streams["train"], streams["val"], folder.name, manifest["unscored_bit"], manifest["report"])


def _build(source: Source, tokenizer: Any, options: CacheOptions, final: Path, tokenizer_key: str) -> None:
    started = time.monotonic()
    for leftover in final.parent.glob(f".{final.name}.building*"):  # the lock says that its builder is dead
        shutil.rmtree(leftover, ignore_errors=True)
    folder = final.with_name(f".{final.name}.building-{os.getpid()}")
    folder.mkdir()
    try:
        pieces = source.pieces()
        job = Job(
            source,
            tokenizer,
            pieces,
            folder,
            np.dtype(np.uint16),
            options.val_fraction,
            options.max_line_bytes,
            options.deduplicate,
        )
        _prepare_tokenizer(job, options, tokenizer_key)
        job = job._replace(dtype=np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32))
        results = tokenize(job, options.num_processes)
        manifest = _finish(job, results)
        manifest["report"]["seconds"] = round(time.monotonic() - started, 3)
        tokenizer.save(folder)
        _write_durably(folder / _MANIFEST, json.dumps(manifest, indent=1))
        if final.exists():  # damaged: `_open` refused it
            shutil.rmtree(final)
        os.rename(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _logger.info("corpus       %s", describe_report(manifest["report"]))


def _prepare_tokenizer(job: Job, options: CacheOptions, key: str) -> None:
    """Train the tokenizer on documents of the training split, or load what an earlier build trained."""
    if not job.tokenizer.is_trained:
        folder = options.cache_dir / "tokenizers" / key
        if not (folder / "tokenizer.json").is_file():
            job.tokenizer.train(_sample(job, job.tokenizer.sample_bytes))
            job.tokenizer.save(folder)
        job.tokenizer.load((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if not job.tokenizer.has_one_token_a_byte:
        sample = [text for text, _ in zip(_sample(job, 1 << 20), range(_FAST_CHECK_DOCUMENTS), strict=False)]
        if not job.tokenizer.verify_fast(sample):
            _logger.info("tokenizer: no faster engine gives the same ids; `tokenizers` encodes")


def _sample(job: Job, num_bytes: int) -> Iterator[str]:
    """Yield training text from pieces spread over the corpus, the same share of each, `num_bytes` in all."""
    share = max(num_bytes // max(len(job.pieces), 1), 1)
    cleaner = Cleaner(max_line_bytes=job.max_line_bytes)
    for piece in job.pieces:
        taken = 0
        for document in clean_documents(job, piece, cleaner):
            if not isinstance(document, Document) or is_validation(document.digest, job.val_fraction):
                continue
            yield document.text
            taken += document.num_bytes
            if taken >= share:
                break


def _finish(job: Job, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Remove duplicates and indices, and return the manifest."""
    counts = sum((Counter(result["counts"]) for result in results), Counter())
    if job.deduplicate:
        remove_duplicates(job, results, counts)
    shards: dict[str, list[tuple[str, int]]] = {}
    for split in SPLITS:
        shards[split] = [(shard_name(split, i), result[split]) for i, result in enumerate(results)]
        for name, count in shards[split]:
            if not count:
                (job.folder / name).unlink()
        shards[split] = [(name, count) for name, count in shards[split] if count]
    for i in range(len(results)):
        (job.folder / index_name(i)).unlink()
    report: dict[str, Any] = {key: counts[key] for key in ("documents", "bytes", "duplicates", "empty")}
    report |= {key: counts[key] for key in ("invalid_utf8", "long_lines", "broken_lines")}
    report |= {f"{split}_tokens": sum(count for _, count in shards[split]) for split in SPLITS}
    return {
        **shards,
        "dtype": job.dtype.name,
        "tokenizer": job.tokenizer.fingerprint(),
        "unscored_bit": unscored_bit(job.dtype) if job.source.is_scored else 0,
        "report": report,
    }


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
