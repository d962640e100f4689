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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data.cleaning import DIGEST_BYTES, Cleaner, Document, ScoredText, digest_of, is_validation
from data.sources import Piece, Source
from data.tokens import ShardWriter
from llm.errors import CrucibleError, DataError

SPLITS = ("train", "val")
INDEX = np.dtype([("digest", "V16"), ("tokens", "<i8"), ("bytes", "<i8"), ("val", "?")])
"""One record per document, in order, from which duplicates are found afterwards."""
_BATCH_BYTES = 1 << 20  # text encoded per call: amortises the call, bounds the memory
_SECONDS_BETWEEN_REPORTS = 0.2
_LOST_KINDS = 32  # characters that a piece reports as lost most often
_OVERLAP_EXAMPLES, _QUOTED_CHARACTERS = 3, 60


class Job(NamedTuple):
    """The settings and pieces that a worker needs."""

    source: Source
    tokenizer: Any
    pieces: list[Piece]
    """Pieces of the source, followed by those of its own validation set."""
    folder: Path
    dtype: np.dtype
    val_fraction: float
    max_line_bytes: int | None
    deduplicate: bool
    num_val_pieces: int = 0
    """Number of pieces at the end of `pieces` that belong to the source's own validation set."""
    held_out: frozenset[bytes] = frozenset()
    """Digests of the documents of that set."""

    @property
    def num_train_pieces(self) -> int:
        """Number of pieces before those of the source's own validation set."""
        return len(self.pieces) - self.num_val_pieces

    def is_own_validation(self, index: int) -> bool:
        """Return whether a piece belongs to the source's own validation set."""
        return index >= self.num_train_pieces

    def goes_to_validation(self, index: int, digest: bytes) -> bool:
        """Return whether a document of a piece belongs to the validation split."""
        if self.num_val_pieces:
            return self.is_own_validation(index)
        return is_validation(digest, self.val_fraction)


def shard_name(split: str, index: int) -> str:
    """Return the file name of one piece's shard."""
    return f"{split}-{index:05d}.bin"


def index_name(index: int) -> str:
    """Return the file name of one piece's document index."""
    return f"index-{index:05d}.npy"


def tokenize_piece(job: Job, index: int, report: Callable[[int], None]) -> dict[str, Any]:
    """Write one piece's shards and document index; return its counts, and what was lost and what overlaps."""
    cleaner = Cleaner(max_line_bytes=None if job.is_own_validation(index) else job.max_line_bytes)
    writers = {split: ShardWriter(job.folder / shard_name(split, index), job.dtype) for split in SPLITS}
    records: list[np.ndarray] = []
    lost: Counter[str] = Counter()
    overlap: list[str] = []
    try:
        for batch in _batches(clean_documents(job, index, cleaner, overlap)):
            encoded = _encode(job, batch, lost)
            records.append(_write_batch(job, index, batch, encoded, writers))
            report(int(records[-1]["bytes"].sum()))
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    with open(job.folder / index_name(index), "wb") as file:
        np.save(file, np.concatenate([np.empty(0, INDEX), *records]))
    counts = dict(cleaner.counts) | {"lost_bytes": sum(len(c.encode()) * n for c, n in lost.items())}
    tokens = {split: writer.count for split, writer in writers.items()}
    return {"counts": counts, "lost": dict(lost.most_common(_LOST_KINDS)), "overlap": overlap, **tokens}


def clean_documents(
    job: Job, index: int, cleaner: Cleaner, overlap: list[str] | None = None
) -> Iterator[Document | ScoredText]:
    """Yield one piece's clean documents, without copies and without documents of the source's own validation set.

    That set itself is yielded whole, copies included, so that figures on it equal those that others publish.

    Args:
        overlap: takes the beginnings of the first training documents that the validation set contains too.
    """
    is_own, seen = job.is_own_validation(index), set[bytes]()
    source = job.source.validation if is_own else job.source
    assert source is not None  # only a source with a validation set of its own has pieces of it
    for raw in source.read(job.pieces[index], cleaner.counts):
        document = cleaner(raw)
        if document is None:
            continue
        name = digest_of(document)
        if not is_own and name in job.held_out:
            cleaner.discard(document, "overlap")
            if overlap is not None and len(overlap) < _OVERLAP_EXAMPLES:
                overlap.append(_beginning(document))
            continue
        if job.deduplicate and not is_own and isinstance(document, Document):
            if name in seen:
                cleaner.discard(document, "duplicates")
                continue
            seen.add(name)
        yield document


def _beginning(document: Document | ScoredText) -> str:
    text = document.text if isinstance(document, Document) else document.data.decode("ascii")
    return text[:_QUOTED_CHARACTERS]


def _batches(documents: Iterator[Document | ScoredText]) -> Iterator[list[Document | ScoredText]]:
    batch: list[Document | ScoredText] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_batch(
    job: Job,
    index: int,
    batch: list[Document | ScoredText],
    encoded: list[np.ndarray],
    writers: dict[str, ShardWriter],
) -> np.ndarray:
    hidden = unscored_bit(job.dtype) if job.source.is_scored else 0  # in a scored corpus, bos carries no loss
    bos = np.array([job.tokenizer.bos_id | hidden], job.dtype)
    digests = [digest_of(document) for document in batch]
    is_val = [job.goes_to_validation(index, name) for name in digests]
    for split, wanted in zip(SPLITS, (False, True), strict=True):
        parts = [part for ids, val in zip(encoded, is_val, strict=True) if val is wanted for part in (bos, ids)]
        if parts:
            writers[split].write(np.concatenate(parts, dtype=job.dtype, casting="unsafe"))
    records = np.empty(len(batch), INDEX)
    records["digest"] = np.frombuffer(b"".join(digests), f"V{DIGEST_BYTES}")
    records["tokens"] = [len(ids) + 1 for ids in encoded]
    records["bytes"] = [document.num_bytes for document in batch]
    records["val"] = is_val
    return records


def _encode(job: Job, batch: list[Document | ScoredText], lost: Counter[str]) -> list[np.ndarray]:
    if not job.source.is_scored:
        texts = [document.text for document in batch if isinstance(document, Document)]
        encoded = job.tokenizer.encode_batch(texts)
        lost.update(lost_characters(job.tokenizer, texts, encoded))
        return encoded
    unscored = np.array(unscored_bit(job.dtype), job.dtype)
    return [
        np.frombuffer(d.data, np.uint8).astype(job.dtype) | np.where(d.is_scored, 0, unscored).astype(job.dtype)
        for d in batch
        if isinstance(d, ScoredText)
    ]


def lost_characters(tokenizer: Any, texts: Sequence[str], encoded: Sequence[np.ndarray]) -> Counter[str]:
    """Return how often each character of the texts is missing after encoding and decoding.

    Characters are counted without their order, which needs one pass. Unknown characters, removed line ends and
    lowered letters are found. A space that the tokenizer adds is no loss.
    """
    lost: Counter[str] = Counter()
    if tokenizer.is_lossless:
        return lost
    for text, ids in zip(texts, encoded, strict=True):
        decoded = tokenizer.decode(ids)
        if decoded != text:
            lost.update(Counter(text) - Counter(decoded))
    return lost


def unscored_bit(dtype: np.dtype) -> int:
    """Return the bit that marks an id of a scored corpus that carries no loss as a label."""
    return 1 << (8 * dtype.itemsize - 1)


def explain_disk_error(error: OSError, folder: Path) -> DataError:
    """Turn a failed write into a message that names the folder and the remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"loader.cache_dir={folder}: the disk is full; free space, or set another loader.cache_dir")
    return DataError(f"loader.cache_dir={folder}: cannot be written ({error}); set another loader.cache_dir")


def send(pipe: IO[bytes], message: dict[str, Any]) -> None:
    """Write one message as a line of JSON."""
    pipe.write(json.dumps(message).encode() + b"\n")
    pipe.flush()


def main() -> None:
    """Read a job and then piece numbers from standard input; answer on standard output, one line per message."""
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
