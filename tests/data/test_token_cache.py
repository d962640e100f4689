import errno
import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import cache_builder, token_cache, worker
from data.cache_builder import CacheOptions
from data.cleaning import digest
from data.sources import PythonSource
from data.token_cache import default_cache_dir, open_or_build
from data.tokenizer import BpeTokenizer, ByteTokenizer
from llm.errors import DataError

ROOT = Path(token_cache.__file__).parent.parent


def options(folder, **changes) -> CacheOptions:
    return CacheOptions(folder, 0.2, True, None, 1)._replace(**changes)


def documents_of(stream, tokenizer) -> list[str]:
    ids = stream.read(0, len(stream))
    starts = np.flatnonzero(ids == tokenizer.bos_id)
    assert starts[0] == 0
    return [tokenizer.decode(part) for part in np.split(ids, starts[1:])]


def folders(cache_dir) -> list[str]:
    return sorted(path.name for path in (cache_dir / "tokens").iterdir() if path.is_dir())


@pytest.fixture
def cut_small(monkeypatch):
    """Make small corpora have many pieces."""
    from data import text_files

    monkeypatch.setattr(text_files, "piece_bytes", lambda total: 500)


def test_both_splits_together_are_the_corpus_and_share_no_document(make_text, write_lines, texts, tmp_path):
    cache = open_or_build(make_text(write_lines(texts)), ByteTokenizer(), options(tmp_path))
    train, val = documents_of(cache.train, ByteTokenizer()), documents_of(cache.val, ByteTokenizer())
    assert sorted(train + val) == sorted(texts)
    assert not set(train) & set(val)
    assert cache.report["documents"] == len(texts)
    assert cache.report["bytes"] == sum(len(text.encode()) for text in texts)
    assert (cache.report["train_tokens"], cache.report["val_tokens"]) == (len(cache.train), len(cache.val))


@pytest.mark.usefixtures("cut_small")
def test_the_tokens_do_not_depend_on_the_number_of_processes(make_text, write_lines, texts, tmp_path):
    source = make_text(write_lines(texts * 3))
    assert len(source.pieces()) > 20
    alone = open_or_build(source, ByteTokenizer(), options(tmp_path / "1"))
    shared = open_or_build(source, ByteTokenizer(), options(tmp_path / "3", num_processes=3))
    for split in ("train", "val"):
        one, three = getattr(alone, split), getattr(shared, split)
        assert np.array_equal(one.read(0, len(one)), three.read(0, len(three)))
    assert alone.fingerprint == shared.fingerprint
    assert {**alone.report, "seconds": 0} == {**shared.report, "seconds": 0}


@pytest.mark.usefixtures("cut_small")
@pytest.mark.usefixtures("cut_small")
def test_a_package_named_data_in_the_current_folder_is_not_imported(
    make_text, write_lines, texts, tmp_path, monkeypatch
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    cache = open_or_build(make_text(write_lines(texts)), ByteTokenizer(), options(tmp_path / "c", num_processes=2))
    assert cache.report["documents"] == len(texts)


def test_copies_are_removed_and_counted_and_the_first_in_order_stays(make_text, write_lines, texts, tmp_path):
    doubled = [*texts, *texts[::-1], texts[0]]
    cache = open_or_build(make_text(write_lines(doubled)), ByteTokenizer(), options(tmp_path, val_fraction=1e-9))
    assert documents_of(cache.train, ByteTokenizer()) == texts
    assert cache.report["duplicates"] == len(texts) + 1
    assert cache.report["documents"] == len(texts)
    assert cache.report["bytes"] == sum(len(text.encode()) for text in texts)


def test_copies_are_kept_without_deduplicate(make_text, write_lines, texts, tmp_path):
    source = make_text(write_lines([*texts, *texts]))
    cache = open_or_build(source, ByteTokenizer(), options(tmp_path, deduplicate=False))
    assert len(documents_of(cache.train, ByteTokenizer()) + documents_of(cache.val, ByteTokenizer())) == 2 * len(texts)


def test_discarded_documents_are_counted_in_the_report(make_text, tmp_path):
    contents = {"ok": b"fine\n", "empty": b"  \n", "latin": b"caf\xe9\n", "long": b"x" * 99 + b"\n", "copy": b"fine\n"}
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    source = make_text(str(tmp_path / "*.txt"))
    report = open_or_build(source, ByteTokenizer(), options(tmp_path / "cache", max_line_bytes=50)).report
    found = {key: report[key] for key in ("documents", "empty", "invalid_utf8", "long_lines", "duplicates")}
    assert found == {"documents": 1, "empty": 1, "invalid_utf8": 1, "long_lines": 1, "duplicates": 1}


def test_a_second_start_builds_nothing(make_text, write_lines, texts, tmp_path, monkeypatch):
    source = make_text(write_lines(texts))
    first = open_or_build(source, BpeTokenizer(vocab_size=270, sample_bytes=4000), options(tmp_path))
    monkeypatch.setattr(token_cache, "build_cache", None)
    tokenizer = BpeTokenizer(vocab_size=270, sample_bytes=4000)
    second = open_or_build(source, tokenizer, options(tmp_path))
    assert second.fingerprint == first.fingerprint
    assert tokenizer.vocab_size == 270


@pytest.mark.parametrize(
    "change", ["content", "val_fraction", "deduplicate", "max_line_bytes", "tokenizer", "CACHE_VERSION"]
)
def test_every_relevant_change_builds_a_new_cache(make_text, write_lines, texts, tmp_path, monkeypatch, change):
    path = write_lines(texts)
    tokenizer = ByteTokenizer()
    before = open_or_build(make_text(path), tokenizer, options(tmp_path / "cache")).fingerprint
    settings = {"val_fraction": 0.3, "deduplicate": False, "max_line_bytes": 1000}
    if change == "content":
        stat = path.stat()
        path.write_text(path.read_text().replace("document 7 ", "document 8 "))
        assert path.stat().st_size == stat.st_size
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "tokenizer":
        tokenizer = BpeTokenizer(vocab_size=257, sample_bytes=1000)
    elif change == "CACHE_VERSION":
        monkeypatch.setattr(token_cache, "CACHE_VERSION", -1)
    changed = options(tmp_path / "cache", **{change: settings[change]} if change in settings else {})
    assert open_or_build(make_text(path), tokenizer, changed).fingerprint != before


def test_the_tokenizer_learns_from_training_documents_alone(make_text, write_lines, tmp_path, monkeypatch):
    texts = [f"{i} {'validation' if i % 2 else 'training'}\n" for i in range(40)]
    wanted = {text: bool(i % 2) for i, text in enumerate(texts)}
    monkeypatch.setattr(cache_builder, "is_validation", lambda name, _: wanted[by_digest[name]])
    by_digest = {digest(text.encode()): text for text in texts}
    seen: list[str] = []
    monkeypatch.setattr(BpeTokenizer, "train", lambda self, documents: seen.extend(documents) or self.load("{}"))
    with pytest.raises(Exception):  # noqa: B017, PT011 - "{}" is no tokenizer; what was seen is the question
        open_or_build(
            make_text(write_lines(texts)), BpeTokenizer(vocab_size=257, sample_bytes=1 << 20), options(tmp_path)
        )
    assert seen == texts[::2]


def test_the_sample_is_spread_over_the_corpus(make_text, write_lines, texts, tmp_path, cut_small):
    source = make_text(write_lines(texts))
    job = worker.Job(source, ByteTokenizer(), source.pieces(), tmp_path, np.dtype("u2"), 0.0, None, True)
    sample = list(cache_builder._sample(job, 2000))
    assert any(text in sample for text in texts[:10])
    assert any(text in sample for text in texts[-10:])
    assert 2000 <= sum(map(len, sample)) < 2000 + 110 * len(job.pieces)


class FullDisk(io.BytesIO):
    """A file on a disk with room for 64 bytes."""

    def write(self, data):
        if self.tell() + len(data) > 64:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_reported_and_leaves_nothing_behind(make_text, write_lines, texts, tmp_path, monkeypatch):
    source = make_text(write_lines(texts))
    with monkeypatch.context() as full:
        full.setattr("data.tokens.open", lambda *_: FullDisk(), raising=False)
        with pytest.raises(DataError, match=r"loader\.cache_dir=.*: the disk is full; free space"):
            open_or_build(source, ByteTokenizer(), options(tmp_path / "cache"))
    assert folders(tmp_path / "cache") == []
    assert len(open_or_build(source, ByteTokenizer(), options(tmp_path / "cache")).train) > 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_folder_without_write_permission_is_named(make_text, write_lines, texts, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(DataError, match=r"loader\.cache_dir=.*cannot be written"):
        open_or_build(make_text(write_lines(texts)), ByteTokenizer(), options(tmp_path / "cache"))


def test_a_cache_folder_that_is_a_file_is_named(make_text, write_lines, texts, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"loader\.cache_dir=.*cannot be written"):
        open_or_build(make_text(write_lines(texts)), ByteTokenizer(), options(tmp_path / "cache"))


@pytest.mark.usefixtures("cut_small")
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_broken_document_stops_the_build_and_leaves_nothing_behind(
    make_text, write_lines, texts, tmp_path, num_processes
):
    path = write_lines(texts)
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl: line 201 is broken"):
        open_or_build(make_text(path), ByteTokenizer(), options(tmp_path / "cache", num_processes=num_processes))
    assert folders(tmp_path / "cache") == []


def test_the_folder_of_a_killed_build_is_never_read_and_is_removed(make_text, write_lines, texts, tmp_path):
    source = make_text(write_lines(texts))
    key = open_or_build(source, ByteTokenizer(), options(tmp_path / "cache")).fingerprint
    final = tmp_path / "cache" / "tokens" / key
    final.rename(final.with_name(f".{key}.building-1"))
    (final.with_name(f".{key}.building-1") / "train-00000.bin").write_bytes(b"half")
    cache = open_or_build(source, ByteTokenizer(), options(tmp_path / "cache"))
    assert sorted(documents_of(cache.train, ByteTokenizer()) + documents_of(cache.val, ByteTokenizer())) == sorted(
        texts
    )
    assert folders(tmp_path / "cache") == [key]


@pytest.mark.parametrize("name", ["train-00000.bin", "manifest.json"])
def test_a_corrupt_cache_is_built_again(make_text, write_lines, texts, tmp_path, name, caplog):
    source = make_text(write_lines(texts))
    key = open_or_build(source, ByteTokenizer(), options(tmp_path / "cache")).fingerprint
    path = tmp_path / "cache" / "tokens" / key / name
    path.write_bytes(path.read_bytes()[:-3])
    cache = open_or_build(source, ByteTokenizer(), options(tmp_path / "cache"))
    assert "corrupt" in caplog.text
    assert sorted(documents_of(cache.train, ByteTokenizer()) + documents_of(cache.val, ByteTokenizer())) == sorted(
        texts
    )


def prepare_and_say(path, cache_dir, gate, answers):
    """Run in a process of its own: build, and answer with the fingerprint, the tokens, and whether it built."""
    from data.text_files import TextFiles

    built = []
    original = token_cache.build_cache
    token_cache.build_cache = lambda *arguments: built.append(True) or time.sleep(0.3) or original(*arguments)
    gate.wait()
    source = TextFiles(files=str(path), field="text", document_bytes=None, broken_lines="raise")
    cache = open_or_build(source, ByteTokenizer(), options(cache_dir))
    answers.put((cache.fingerprint, cache.train.read(0, len(cache.train)).tolist(), bool(built)))


def test_of_two_processes_that_prepare_one_cache_one_builds_and_both_read(write_lines, texts, tmp_path):
    context = multiprocessing.get_context("fork")
    gate, answers = context.Barrier(2), context.Queue()
    arguments = (write_lines(texts), tmp_path / "cache", gate, answers)
    processes = [context.Process(target=prepare_and_say, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = answers.get(timeout=60), answers.get(timeout=60)
    for process in processes:
        process.join()
    assert first[:2] == second[:2]
    assert {first[2], second[2]} == {True, False}


def test_tokens_of_another_tokenizer_are_refused(make_text, write_lines, texts, tmp_path):
    source = make_text(write_lines(texts))
    key = open_or_build(source, ByteTokenizer(), options(tmp_path)).fingerprint
    path = tmp_path / "tokens" / key / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": "another"}))
    with pytest.raises(DataError, match="made by another tokenizer"):
        open_or_build(source, ByteTokenizer(), options(tmp_path))


def test_a_vocabulary_beyond_sixteen_bits_is_stored_in_thirty_two(make_text, write_lines, texts, tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = (1 << 16) + 1
        bos_id = 1 << 16

    cache = open_or_build(make_text(write_lines(texts)), Wide(), options(tmp_path))
    assert cache.train.dtype == np.uint32
    assert cache.train.read(0, 1).tolist() == [1 << 16]


def test_workers_import_no_torch():
    code = "import sys, data.worker, data.hub, data.text_files, data.synthetic; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CRUCIBLE_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("CRUCIBLE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "crucible"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "crucible"


def test_the_default_source_is_text_without_tests():
    source = PythonSource(site_packages=False, tests=False)
    files = source.files()
    assert any(path.endswith("/json/decoder.py") for path in files)
    assert not any("/test/" in path or "/site-packages/" in path for path in files)
    assert files == source.files()
    assert source.fingerprint() == source.fingerprint()


def test_site_packages_add_documents():
    files = PythonSource(site_packages=True, tests=False).files()
    assert any(path.endswith("/numpy/__init__.py") for path in files)
