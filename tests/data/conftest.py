"""Makes corpora that are built in milliseconds, and data modules for them."""

import json
from pathlib import Path

import pytest

from data.data_module import TokenDataModule
from data.text_files import TextFiles
from data.tokenizer import ByteTokenizer


@pytest.fixture
def make_text():
    """Return a function that makes TextFiles, by default with the settings of conf/data/text.yaml."""

    def make(files, **settings) -> TextFiles:
        files = str(files) if isinstance(files, Path) else files
        defaults = {"field": "text", "document_bytes": None, "broken_lines": "raise"}
        return TextFiles(files=files, **defaults | settings)

    return make


@pytest.fixture
def make_module(tmp_path):
    """Return a function that makes a TokenDataModule, by default with a cache of its own."""

    def make(source, **settings) -> TokenDataModule:
        defaults = {
            "tokenizer": ByteTokenizer(),
            "context_length": 16,
            "batch_tokens": 64,
            "micro_batch_size": 2,
            "seed": 0,
            "val_fraction": 0.2,
            "val_tokens": 1 << 20,
            "num_workers": 0,
            "cache_dir": tmp_path / "cache",
            "deduplicate": True,
            "max_line_bytes": None,
            "num_processes": 1,
        }
        return TokenDataModule(source=source, **defaults | settings)

    return make


@pytest.fixture
def write_lines(tmp_path):
    """Return a function that writes documents as JSON lines."""

    def write(texts, name="corpus.jsonl", field="text") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def texts() -> list[str]:
    """Two hundred different documents of 20 to 100 bytes."""
    return [f"document {i} " + "abc déf " * (1 + i % 10) + "\n" for i in range(200)]


@pytest.fixture
def read_all():
    """Return a function that lists all documents of a source, in order, and what was skipped."""
    from collections import Counter

    def read(source):
        counts: Counter[str] = Counter()
        return [document for piece in source.pieces() for document in source.read(piece, counts)], counts

    return read
