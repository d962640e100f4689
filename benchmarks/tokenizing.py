"""Is the token cache built faster than by `datasets.map` calling the same tokenizer with as many processes?

    python benchmarks/tokenizing.py --processes 2 --repeats 5

Each round runs every side once, on the source files of this Python's standard library, in an order that rotates. Each
side begins with documents on disk and ends with token ids on disk. Ours also cleans, hashes, finds duplicates and
splits. The ids of both sides are compared before any time is taken.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from data.sources import PythonSource
from data.token_cache import CacheOptions, open_or_build
from data.tokenizer import BpeTokenizer

VAL_FRACTION = 0.02


def read_documents(source: PythonSource) -> list[str]:
    """Return the corpus as text."""
    raws = [raw for piece in source.pieces() for raw in source.read(piece, Counter())]
    return [raw.decode("utf-8") for raw in raws if isinstance(raw, bytes) and raw.strip()]


def ours(source: PythonSource, tokenizer: BpeTokenizer, folder: Path, processes: int) -> Any:
    """Build a cache with a trained tokenizer."""
    return open_or_build(source, tokenizer, CacheOptions(folder, VAL_FRACTION, True, None, processes))


def with_map(corpus: Any, tokenizer: BpeTokenizer, folder: Path, processes: int, batched: bool) -> Any:
    """Tokenise with `datasets.map` and the `tokenizers` engine, into Arrow files."""
    engine = tokenizer._tokenizer

    def encode_one(record: dict[str, Any]) -> dict[str, Any]:
        return {"ids": engine.encode(record["text"], add_special_tokens=False).ids}

    def encode_many(records: dict[str, Any]) -> dict[str, Any]:
        return {"ids": [encoding.ids for encoding in engine.encode_batch(records["text"], add_special_tokens=False)]}

    return corpus.map(
        encode_many if batched else encode_one,
        batched=batched,
        num_proc=processes,
        remove_columns=["text"],
        load_from_cache_file=False,
        cache_file_name=str(folder / "map.arrow"),
    )


def compare_ids(cache: Any, mapped: Any, tokenizer: BpeTokenizer, documents: list[str]) -> None:
    """Fail unless both sides hold the same documents as the same ids."""
    sides = []
    for stream in (cache.train, cache.val):
        ids = stream.read(0, len(stream))
        starts = np.flatnonzero(ids == tokenizer.bos_id)
        sides += [part[1:].tobytes() for part in np.split(ids, starts[1:])]
    theirs = {np.array(record["ids"], np.uint16).tobytes() for record in mapped}
    assert set(sides) == theirs, "the two sides disagree"
    assert len(sides) == len(set(documents)), "a document is missing"


def measure(sides: dict[str, Callable[[Path], Any]], repeats: int) -> dict[str, list[float]]:
    """Time every side once per round, in an order that rotates."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            folder = Path(tempfile.mkdtemp())
            started = time.perf_counter()
            sides[name](folder)
            seconds[name].append(time.perf_counter() - started)
            shutil.rmtree(folder)
    return seconds


def main() -> None:
    """Print a table of medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--site-packages", action="store_true", help="a larger corpus: the installed packages too")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    source = PythonSource(site_packages=arguments.site_packages, tests=False)
    documents = read_documents(source)
    size = sum(len(text.encode()) for text in documents)
    tokenizer = BpeTokenizer(vocab_size=arguments.vocab_size, sample_bytes=1 << 24)
    tokenizer.train(iter(documents))
    slow = BpeTokenizer(vocab_size=arguments.vocab_size, sample_bytes=1 << 24)
    slow.allows_fast = False
    slow.load(tokenizer._json or "")
    corpus_folder = tempfile.mkdtemp()
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(corpus_folder)
    corpus = datasets.load_from_disk(corpus_folder)
    n = arguments.processes
    sides = {
        "token cache (tiktoken's engine)": lambda folder: ours(source, tokenizer, folder, n),
        "token cache (`tokenizers` engine)": lambda folder: ours(source, slow, folder, n),
        "datasets.map, batched": lambda folder: with_map(corpus, tokenizer, folder, n, True),
        "datasets.map, one by one": lambda folder: with_map(corpus, tokenizer, folder, n, False),
    }
    with tempfile.TemporaryDirectory() as folder:
        mapped = with_map(corpus, tokenizer, Path(folder), n, True)
        compare_ids(ours(source, tokenizer, Path(folder), n), mapped, tokenizer, documents)
    seconds = measure(sides, arguments.repeats)
    shutil.rmtree(corpus_folder)
    fastest_peer = min(statistics.median(seconds[name]) for name in sides if name.startswith("datasets"))
    print(f"{len(documents)} documents, {size / 1e6:.1f} MB, vocabulary {arguments.vocab_size}, {n} processes")
    print(f"{'':34}{'median s':>9}{'min':>7}{'max':>7}{'MB/s':>8}{'x fastest map':>15}")
    for name, values in seconds.items():
        middle = statistics.median(values)
        spread = f"{middle:9.2f}{min(values):7.2f}{max(values):7.2f}"
        print(f"{name:34}{spread}{size / middle / 1e6:8.1f}{fastest_peer / middle:15.2f}")


if __name__ == "__main__":
    main()
