import pickle

import pytest

from data.hub import HubDataset
from llm.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def folders(tmp_path, write_lines):
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        for part in range(2):
            texts = [f"{name} {part} {i}" for i in range(50)]
            write_lines(texts, name=f"{name}/part{part}.jsonl", field="content" if name == "right" else "text")
    return tmp_path / "left", tmp_path / "right"


def make(path=None, **settings):
    defaults = {
        "name": None,
        "split": "train",
        "field": "text",
        "revision": None,
        "streaming": False,
        "max_documents": None,
        "mixture": None,
        "seed": 0,
    }
    return HubDataset(path=None if path is None else str(path), **defaults | settings)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_document_is_read_once_also_after_pickling(folders, read_all, streaming):
    source = make(folders[0], streaming=streaming)
    expected = [f"left {part} {i}" for part in range(2) for i in range(50)]
    assert read_all(source)[0] == expected
    assert read_all(pickle.loads(pickle.dumps(source)))[0] == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_max_documents_limits_what_is_read(folders, read_all, streaming):
    assert len(read_all(make(folders[0], streaming=streaming, max_documents=7))[0]) == 7


def test_a_split_can_be_a_slice(folders, read_all):
    assert len(read_all(make(folders[0], split="train[:10%]"))[0]) == 10


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_draws_by_weight_and_repeats_nothing(folders, read_all, streaming):
    mixture = [{"path": str(folders[0]), "weight": 3}, {"path": str(folders[1]), "weight": 1, "field": "content"}]
    documents = read_all(make(mixture=mixture, streaming=streaming))[0]
    left = sum(document.startswith("left") for document in documents)
    assert len(set(documents)) == len(documents)
    # about 133 draws with p = 3/4, until the 100 of the left are used up: five standard deviations are 0.19
    assert abs(left / len(documents) - 0.75) < 0.19
    assert documents == read_all(make(mixture=mixture, streaming=streaming))[0]
    assert documents != read_all(make(mixture=mixture, streaming=streaming, seed=1))[0]


def test_the_error_for_a_missing_column_lists_the_columns(folders):
    with pytest.raises(DataError, match=r"data\.field=text: not in .*right; its columns are content"):
        make(folders[1]).pieces()


def test_a_missing_dataset_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data\.path=.*empty: cannot be loaded"):
        make(tmp_path / "empty").pieces()


def test_the_fingerprint_follows_the_files(folders):
    before = make(folders[0]).fingerprint()
    assert make(folders[0]).fingerprint() == before
    assert make(folders[0], max_documents=3).fingerprint() != before
    with open(folders[0] / "part0.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    assert make(folders[0]).fingerprint() != before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either data.path or data.mixture"),
        ({"path": "a", "mixture": [{"path": "b"}]}, "give either data.path or data.mixture"),
        ({"mixture": [{"path": "b", "wieght": 1}]}, "wieght is no key .*did you mean weight"),
        ({"mixture": [{"path": "b", "weight": 0}]}, "weight=0 of b: must be positive"),
        ({"mixture": [{"weight": 1}]}, "a member lacks its path"),
        ({"path": "a", "max_documents": 0}, "data.max_documents=0: must be at least 1"),
    ],
)
def test_unsupported_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


@pytest.mark.parametrize("streaming", [False, True])
def test_max_documents_of_uneven_streams_are_all_read(tmp_path, write_lines, read_all, streaming):
    (tmp_path / "uneven").mkdir()
    for part, count in enumerate((300, 50)):
        write_lines([f"{part} {i}" for i in range(count)], name=f"uneven/part{part}.jsonl")
    assert len(read_all(make(tmp_path / "uneven", streaming=streaming, max_documents=320))[0]) == 320


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_file_is_read(tmp_path, write_lines, read_all, streaming):
    path = write_lines(["one", "two"])
    assert read_all(make(path, streaming=streaming))[0] == ["one", "two"]
    (tmp_path / "a.csv").write_text("text,n\nNA,1\n007,2\n")
    assert read_all(make(tmp_path / "a.csv", streaming=streaming))[0] == ["NA", "007"]
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(DataError, match=r"a\.txt: a file without records; read it with data=text data\.files="):
        make(tmp_path / "a.txt", streaming=streaming).pieces()


@pytest.mark.parametrize("path", ["./missing", "missing.jsonl", "/nowhere/set", "a/b/c"])
def test_a_local_path_is_not_requested_from_the_hub(path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(DataError, match=r"data\.path=.*: no such file or folder"):
        make(path).fingerprint()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_save_to_disk_is_read(tmp_path, read_all, streaming):
    import datasets

    parts = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(20)]}) for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["train"].save_to_disk(tmp_path / "one")
    assert len(read_all(make(tmp_path / "both", streaming=streaming, split="test[:25%]"))[0]) == 5
    assert read_all(make(tmp_path / "both", streaming=streaming, val_split="test").validation)[0][0] == "test 0"
    assert len(read_all(make(tmp_path / "one", streaming=streaming))[0]) == 20
    with pytest.raises(DataError, match=r"data\.split=valid: not in .*both; its splits are train, test"):
        make(tmp_path / "both", split="valid").pieces()
    with pytest.raises(DataError, match=r"data\.split=test: .*one holds one dataset, of the split train"):
        make(tmp_path / "one", split="test").pieces()
