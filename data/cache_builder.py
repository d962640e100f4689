"""Builds a token cache: cleans, tokenises in parallel, removes duplicates, and publishes a whole folder at once."""

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

from data.cleaning import Cleaner, Document, digest_of, is_validation
from data.cleaning_report import describe_report, refuse_loss, summarize
from data.duplicates import remove_duplicates
from data.pool import tokenize
from data.sources import Source
from data.worker import SPLITS, Job, clean_documents, index_name, lost_characters, shard_name, unscored_bit

MANIFEST = "manifest.json"
_FAST_CHECK_DOCUMENTS = 64
_logger = logging.getLogger(__name__)


class CacheOptions(NamedTuple):
    """Settings that decide how a corpus becomes tokens; see TokenDataModule for the meaning of each."""

    cache_dir: Path
    val_fraction: float
    deduplicate: bool
    max_line_bytes: int | None
    num_processes: int | None


def build_cache(source: Source, tokenizer: Any, options: CacheOptions, final: Path, tokenizer_key: str) -> None:
    """Build the cache in a hidden folder and rename it to `final`; the caller holds the lock of `final`."""
    started = time.monotonic()
    for leftover in final.parent.glob(f".{final.name}.building*"):  # the lock proves that its builder is dead
        shutil.rmtree(leftover, ignore_errors=True)
    folder = final.with_name(f".{final.name}.building-{os.getpid()}")
    folder.mkdir()
    try:
        job = _make_job(source, tokenizer, options, folder)
        _prepare_tokenizer(job, options, tokenizer_key)
        job = job._replace(dtype=np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32))
        results = tokenize(job, options.num_processes)
        manifest = _finish(job, results)
        refuse_loss(manifest["report"])
        manifest["report"]["seconds"] = round(time.monotonic() - started, 3)
        tokenizer.save(folder)
        _write_durably(folder / MANIFEST, json.dumps(manifest, indent=1))
        if final.exists():  # it is corrupt, since it could not be opened
            shutil.rmtree(final)
        os.rename(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _logger.info("corpus       %s", describe_report(manifest["report"]))


def _make_job(source: Source, tokenizer: Any, options: CacheOptions, folder: Path) -> Job:
    own = [] if source.validation is None else source.validation.pieces()
    job = Job(
        source=source,
        tokenizer=tokenizer,
        pieces=[*source.pieces(), *own],
        folder=folder,
        dtype=np.dtype(np.uint16),
        val_fraction=options.val_fraction,
        max_line_bytes=options.max_line_bytes,
        deduplicate=options.deduplicate,
        num_val_pieces=len(own),
    )
    return job._replace(held_out=_own_digests(job))


def _own_digests(job: Job) -> frozenset[bytes]:
    """Return the digests of the source's own validation documents, which training must not contain."""
    indices = range(job.num_train_pieces, len(job.pieces))
    return frozenset(digest_of(d) for i in indices for d in clean_documents(job, i, Cleaner(max_line_bytes=None)))


def _prepare_tokenizer(job: Job, options: CacheOptions, key: str) -> None:
    """Train the tokenizer on documents of the training split, or load the one that an earlier build trained."""
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
            _refuse_lossy_sample(job, sample)


def _refuse_lossy_sample(job: Job, sample: list[str]) -> None:
    """Raise DataError before the corpus is tokenised where a sample of it already loses too much."""
    lost = lost_characters(job.tokenizer, sample, job.tokenizer.encode_batch(sample))
    num_bytes = sum(len(text.encode()) for text in sample)
    num_lost = sum(len(character.encode()) * count for character, count in lost.items())
    refuse_loss(
        {"bytes": num_bytes, "lost_bytes": num_lost, "lost_characters": [c for c, _ in lost.most_common(8)]}
        if num_lost > num_bytes / 2  # below this a sample does not decide: the whole corpus is measured
        else {"bytes": num_bytes}
    )


def _sample(job: Job, num_bytes: int) -> Iterator[str]:
    """Yield training text from pieces spread over the corpus, the same share of each, `num_bytes` in all."""
    share = max(num_bytes // max(job.num_train_pieces, 1), 1)
    cleaner = Cleaner(max_line_bytes=job.max_line_bytes)
    for index in range(job.num_train_pieces):
        taken = 0
        for document in clean_documents(job, index, cleaner):
            if not isinstance(document, Document):
                continue
            if not job.num_val_pieces and is_validation(document.digest, job.val_fraction):
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
    report = summarize(results, counts)
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
