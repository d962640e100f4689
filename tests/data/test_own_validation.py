import json

import numpy as np
import pytest

from data import cache_builder
from data.cache_builder import CacheOptions
from data.hub import HubDataset
from data.sources import PythonSource
from data.synthetic import AssociativeRecall, MarkovChain
from data.token_cache import open_or_build
from data.tokenizer import BpeTokenizer, ByteTokenizer
from llm.errors import ConfigError, DataError

OWN = [f"held out {i} " + "xyz " * 9 + "\n" for i in range(20)]


def options(folder, **changes) -> CacheOptions:
    return CacheOptions(folder, 0.2, True, None, 1)._replace(**changes)


def documents_of(stream, tokenizer=None) -> list[str]:
    tokenizer = tokenizer or ByteTokenizer()
    ids = stream.read(0, len(stream)) & 0x7FFF
    return [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == tokenizer.bos_id)[1:])]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_val_files_are_the_whole_validation_split_and_files_the_whole_training_split(
    make_text, write_lines, texts, tmp_path, num_processes
):
    source = make_text(write_lines(texts), val_files=str(write_lines([*OWN, OWN[0]], name="val.jsonl")))
    cache = open_or_build(source, ByteTokenizer(), options(tmp_path / "c", num_processes=num_processes))
    assert documents_of(cache.train) == texts
    assert documents_of(cache.val) == [*OWN, OWN[0]]  # a published set keeps its copies


def test_documents_in_both_are_removed_from_training_counted_and_named_at_every_start(
    make_text, write_lines, texts, tmp_path, caplog
):
    source = make_text(write_lines(texts), val_files=str(write_lines([*OWN, *texts[:5]], name="val.jsonl")))
    for _ in range(2):
        caplog.clear()
        cache = open_or_build(source, ByteTokenizer(), options(tmp_path / "c", deduplicate=False))
        assert "5 documents of the training text are also in the validation set" in caplog.text
        assert repr(texts[0][:60]) in caplog.text
    assert documents_of(cache.train) == texts[5:]
    assert documents_of(cache.val) == [*OWN, *texts[:5]]
    assert (cache.report["overlap"], cache.report["documents"]) == (5, len(texts) + len(OWN))


def test_plain_text_of_both_is_cut_alike_so_that_a_file_in_both_is_found(make_text, make_module, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i} of the text\n" for i in range(9000)))
    (tmp_path / "b.txt").write_text("".join(f"line {i} of another text\n" for i in range(9000)))
    source = make_text([str(tmp_path / n) for n in ("a.txt", "b.txt")], val_files=str(tmp_path / "a.txt"))
    source.document_bytes = "auto"
    cache = open_or_build(source, ByteTokenizer(), options(tmp_path / "c"))
    assert "".join(documents_of(cache.train)) == (tmp_path / "b.txt").read_text()
    source = make_text(tmp_path / "a.txt", val_files=str(tmp_path / "a.txt"), document_bytes="auto")
    with pytest.raises(DataError, match=r"the training split has 0 .*give a validation set that is not the training"):
        make_module(source).prepare_data()


def test_the_tokenizer_never_learns_from_the_validation_set(make_text, write_lines, texts, tmp_path, monkeypatch):
    source = make_text(write_lines([*texts, *OWN]), val_files=str(write_lines(OWN, name="val.jsonl")))
    job = cache_builder._make_job(source, ByteTokenizer(), options(tmp_path), tmp_path)
    assert list(cache_builder._sample(job, 1 << 20)) == texts


def test_another_validation_set_is_another_cache(make_text, write_lines, texts, tmp_path):
    path = write_lines(texts)
    prints = set()
    for number in range(3):
        val_files = str(write_lines(OWN[number:], name=f"val{number}.jsonl")) if number else None
        cache = open_or_build(make_text(path, val_files=val_files), ByteTokenizer(), options(tmp_path / "c"))
        prints.add(cache.fingerprint)
    assert len(prints) == 3


def test_a_missing_or_small_validation_set_is_named(make_text, make_module, write_lines, texts, tmp_path):
    path = write_lines(texts)
    with pytest.raises(DataError, match=r"data\.val_files=/nowhere\.txt: no such file"):
        make_module(make_text(path, val_files="/nowhere.txt")).prepare_data()
    small = str(write_lines(["few"], name="val.jsonl"))
    with pytest.raises(DataError, match="the validation set is too small: the validation split has 4 tokens"):
        make_module(make_text(path, val_files=small)).prepare_data()


def test_modules_of_the_standard_library_can_be_the_validation_set():
    source = PythonSource(site_packages=False, tests=False, val_modules=["json", "ast"])
    own = source.validation
    assert {path.rsplit("/json/")[-1].rsplit("/")[-1] for path in own.files()} >= {"decoder.py", "ast.py"}
    whole = PythonSource(site_packages=False, tests=False).files()
    assert sorted(source.files() + own.files()) == sorted(whole)
    assert own.validation is None
    with pytest.raises(DataError, match=r"data\.val_modules=jsn: not in the standard library; did you mean json"):
        PythonSource(site_packages=False, tests=False, val_modules=["jsn"]).files()
    with pytest.raises(ConfigError, match=r"data\.val_modules=\[\]"):
        PythonSource(site_packages=False, tests=False, val_modules=[])


@pytest.mark.parametrize("kind", ["markov", "recall"])
def test_generated_validation_sets_are_the_same_for_any_number_of_training_documents(kind, tmp_path):
    markov = {"num_symbols": 4, "order": 1, "concentration": 0.5, "document_bytes": 40, "seed": 0}
    recall = {"num_pairs": 2, "pair_tokens": 2, "distance": 4, "length": 24, "seed": 0}
    make, settings = (MarkovChain, markov) if kind == "markov" else (AssociativeRecall, recall)
    found = []
    for count in (30, 50):
        source = make(num_documents=count, num_val_documents=10, **settings)
        cache = open_or_build(source, ByteTokenizer(), options(tmp_path / "c"))
        assert (len(documents_of(cache.train)), len(documents_of(cache.val))) == (count, 10)
        found.append(documents_of(cache.val))
    assert found[0] == found[1]
    with pytest.raises(ConfigError, match=r"data\.num_val_documents=0: must be at least 1"):
        make(num_documents=9, num_val_documents=0, **settings)


@pytest.fixture
def hub_folder(tmp_path, write_lines, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        for split, count in (("train", 40), ("validation", 6)):
            write_lines([f"{name} {split} {i} text" for i in range(count)], name=f"{name}/{split}.jsonl")
    return tmp_path


def hub(**settings) -> HubDataset:
    defaults = {"path": None, "name": None, "split": "train", "field": "text", "revision": None, "streaming": False}
    return HubDataset(**defaults | {"max_documents": None, "mixture": None, "seed": 0} | settings)


@pytest.mark.parametrize("streaming", [False, True])
def test_val_split_is_the_validation_set_of_a_hub_dataset(hub_folder, tmp_path, streaming):
    source = hub(path=str(hub_folder / "left"), val_split="validation", streaming=streaming, max_documents=9)
    cache = open_or_build(source, ByteTokenizer(), options(tmp_path / "c"))
    assert documents_of(cache.train) == [f"left train {i} text" for i in range(9)]
    assert documents_of(cache.val) == [f"left validation {i} text" for i in range(6)]


def test_the_validation_set_of_a_mixture_is_that_of_its_members(hub_folder, read_all):
    mixture = [{"path": str(hub_folder / "left")}, {"path": str(hub_folder / "right"), "val_split": "validation[:2]"}]
    own = hub(mixture=mixture, val_split="validation").validation
    assert read_all(own)[0] == [f"left validation {i} text" for i in range(6)] + [
        f"right validation {i} text" for i in range(2)
    ]
    assert hub(mixture=mixture).validation.members[0]["path"] == str(hub_folder / "right")


def test_bpe_is_trained_and_validated_on_its_own_set(make_text, write_lines, texts, make_module):
    source = make_text(write_lines(texts), val_files=str(write_lines(OWN, name="val.jsonl")))
    module = make_module(source, tokenizer=BpeTokenizer(vocab_size=270, sample_bytes=4000))
    module.prepare_data()
    assert documents_of(module.cache.val, module.tokenizer) == OWN
    assert json.dumps(dict(module.report))
