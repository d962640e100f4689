"""Cleans and tokenises pieces of a source, in this process or in several started as `python -m data.worker`.

Workers are plain subprocesses, not forks: they never import torch or the program that started them, so they start in
a fraction of a second, and threads of the parent cannot deadlock them.
"""

import contextlib
import errno
import json
import pickle
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data.cleaning import DIGEST_BYTES, Cleaner, Document, ScoredText, digest, is_validation
from data.sources import Piece, Source
from data.tokens import ShardWriter
from llm.errors import CrucibleError, DataError

SPLITS = ("train", "val")
INDEX = np.dtype([("digest", "V16"), ("tokens", "<i8"), ("bytes", "<i8"), ("val", "?")])
"""One record a document, in order: what finding duplicates afterwards needs."""
_BATCH_BYTES = 1 << 20  # text encoded per call: amortises the call, bounds the memory
_SECONDS_BETWEEN_REPORTS = 0.2


class Job(NamedTuple):
    """All that a worker needs."""

    source: Source
    tokenizer: Any
    pieces: list[Piece]
    folder: Path
    dtype: np.dtype
    val_fraction: float
    max_line_bytes: int | None
    deduplicate: bool


def shard_name(split: str, index: int) -> str:
    """Return the file name of one piece's shard."""
    return f"{split}-{index:05d}.bin"


def index_name(index: int) -> str:
    """Return the file name of one piece's document index."""
    return f"index-{index:05d}.npy"


def tokenize_piece(job: Job, index: int, report: Callable[[int], None]) -> dict[str, Any]:
    """Write one piece's shards and document index; return its counts."""
    cleaner = Cleaner(max_line_bytes=job.max_line_bytes)
    writers = {split: ShardWriter(job.folder / shard_name(split, index), job.dtype) for split in SPLITS}
    records: list[np.ndarray] = []
    try:
        for batch in _batches(job, index, cleaner):
            records.append(_write_batch(job, batch, writers))
            report(int(records[-1]["bytes"].sum()))
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    with open(job.folder / index_name(index), "wb") as file:
        np.save(file, np.concatenate([np.empty(0, INDEX), *records]))
    return {"counts": dict(cleaner.counts), **{split: writer.count for split, writer in writers.items()}}


def clean_documents(job: Job, piece: Piece, cleaner: Cleaner) -> Iterator[Document | ScoredText]:
    """Yield one piece's clean documents, without copies of documents seen earlier in the piece."""
    seen: set[bytes] = set()
    for raw in job.source.read(piece, cleaner.counts):
        if isinstance(raw, ScoredText):
            cleaner.counts.update(documents=1, bytes=len(raw.data))
            yield raw
            continue
        document = cleaner(raw)
        if document is None:
            continue
        if job.deduplicate:
            if document.digest in seen:
                cleaner.counts.update(duplicates=1, documents=-1, bytes=-document.num_bytes)
                continue
            seen.add(document.digest)
        yield document


def _batches(job: Job, index: int, cleaner: Cleaner) -> Iterator[list[Document | ScoredText]]:
    batch: list[Document | ScoredText] = []
    size = 0
    for document in clean_documents(job, job.pieces[index], cleaner):
        batch.append(document)
        size += len(document.data) if isinstance(document, ScoredText) else document.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_batch(job: Job, batch: list[Document | ScoredText], writers: dict[str, ShardWriter]) -> np.ndarray:
    hidden = unscored_bit(job.dtype) if job.source.is_scored else 0  # where labels are chosen, bos is none of them
    bos = np.array([job.tokenizer.bos_id | hidden], job.dtype)
    digests = [digest(d.data) if isinstance(d, ScoredText) else d.digest for d in batch]
    encoded = _encode(job, batch)
    is_val = [is_validation(name, job.val_fraction) for name in digests]
    for split, wanted in zip(SPLITS, (False, True), strict=True):
        parts = [part for ids, val in zip(encoded, is_val, strict=True) if val is wanted for part in (bos, ids)]
        if parts:
            writers[split].write(np.concatenate(parts, dtype=job.dtype, casting="unsafe"))
    records = np.empty(len(batch), INDEX)
    records["digest"] = np.frombuffer(b"".join(digests), f"V{DIGEST_BYTES}")
    records["tokens"] = [len(ids) + 1 for ids in encoded]
    records["bytes"] = [len(d.data) if isinstance(d, ScoredText) else d.num_bytes for d in batch]
    records["val"] = is_val
    return records


def _encode(job: Job, batch: list[Document | ScoredText]) -> list[np.ndarray]:
    if not job.source.is_scored:
        return job.tokenizer.encode_batch([d.text for d in batch if isinstance(d, Document)])
    unscored = np.array(unscored_bit(job.dtype), job.dtype)
    return [
        np.frombuffer(d.data, np.uint8).astype(job.dtype) | np.where(d.is_scored, 0, unscored).astype(job.dtype)
        for d in batch
        if isinstance(d, ScoredText)
    ]


def unscored_bit(dtype: np.dtype) -> int:
    """Return the bit that marks, in a scored corpus, an id that carries no loss as a label."""
    return 1 << (8 * dtype.itemsize - 1)


def explain_disk_error(error: OSError, folder: Path) -> DataError:
    """Turn a failed write into a message that names the folder and the remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"loader.cache_dir={folder}: the disk is full; free space, or set another loader.cache_dir")
    return DataError(f"loader.cache_dir={folder}: cannot be written ({error}); set another loader.cache_dir")


def send(pipe: IO[bytes], message: dict[str, Any]) -> None:
    """Write one message as a line."""
    pipe.write(json.dumps(message).encode() + b"\n")
    pipe.flush()


def main() -> None:
    """Read a job and then piece numbers from standard input; answer on standard output, one line a message."""
    answers = sys.stdout.buffer
    (length,) = struct.unpack("<Q", sys.stdin.buffer.read(8))
    job: Job = pickle.loads(sys.stdin.buffer.read(length))
    for line in sys.stdin.buffer:
        pending = 0
        last = time.monotonic()

        def report(size: int) -> None:
            nonlocal pending, last
            pending += size
            if time.monotonic() - last > _SECONDS_BETWEEN_REPORTS:
                send(answers, {"progress": pending})
                pending, last = 0, time.monotonic()

        try:
            result = tokenize_piece(job, int(line), report)
        except CrucibleError as error:
            send(answers, {"error": str(error)})
        except OSError as error:
            send(answers, {"error": str(explain_disk_error(error, job.folder))})
        else:
            send(answers, {"progress": pending, "result": result})


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        main()
