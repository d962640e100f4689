import bz2
import gzip
import importlib.util
import io
import json
import lzma
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import text_files
from data.chunks import read_chunks
from data.readers import read_json_lines
from llm.errors import ConfigError, DataError

TEXTS = ["alpha\nbeta", 'naïve, "quoted"', "gamma " * 50]


def decoded(documents):
    return [d if isinstance(d, str) else d.decode() for d in documents]


def compress(path, ending):
    data = path.read_bytes()
    packed = path.with_name(path.name + ending)
    if ending == ".zst":
        with pa.CompressedOutputStream(str(packed), "zstd") as file:
            file.write(data)
    else:
        packed.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[ending].compress(data))
    return packed


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_json_lines_are_read_plain_and_compressed(make_text, write_lines, read_all, ending):
    path = write_lines(TEXTS)
    path = compress(path, ending) if ending else path
    assert read_all(make_text(path))[0] == TEXTS


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_each_file_of_plain_text_is_one_document(make_text, tmp_path, read_all, ending):
    path = tmp_path / "a.txt"
    path.write_text(TEXTS[0])
    path = compress(path, ending) if ending else path
    assert decoded(read_all(make_text(path))[0]) == [TEXTS[0]]


def write_csv(path, sep):
    rows = [f'{i}{sep}"{text.replace(chr(34), chr(34) * 2)}"\n' for i, text in enumerate(TEXTS)]
    path.write_text(f"id{sep}text\n" + "".join(rows))


def write_table(folder, kind):
    path = folder / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pa.table({"id": [0, 1, 2], "text": TEXTS}), path)
    elif kind == "json":
        path.write_text(json.dumps([{"id": i, "text": text} for i, text in enumerate(TEXTS)]))
    else:
        write_csv(path, "\t" if kind == "tsv" else ",")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "json"])
def test_tables_are_read_by_their_text_field(make_text, tmp_path, read_all, kind):
    assert read_all(make_text(write_table(tmp_path, kind)))[0] == TEXTS


def test_a_compressed_table_is_read(make_text, tmp_path, read_all):
    assert read_all(make_text(compress(write_table(tmp_path, "csv"), ".gz")))[0] == TEXTS


def test_a_json_file_with_one_object_per_line_is_read_as_lines(make_text, write_lines, read_all):
    assert read_all(make_text(write_lines(TEXTS, name="a.json")))[0] == TEXTS


def test_several_patterns_keep_their_order_and_name_each_file_once(make_text, tmp_path, read_all):
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    source = make_text([str(tmp_path / "c.txt"), str(tmp_path / "*.txt")])
    assert decoded(read_all(source)[0]) == ["c.txt", "a.txt", "b.txt"]


def test_large_files_are_cut_into_ranges_that_cover_each_document_once(make_text, write_lines, read_all, monkeypatch):
    texts = [f"{i} " + "é" * (i * 37 % 400) for i in range(300)]
    source = make_text(write_lines(texts))
    monkeypatch.setattr(text_files, "piece_bytes", lambda total: 999)
    assert len(source.pieces()) > 20
    assert read_all(source)[0] == texts


lines = st.lists(st.text(alphabet="ab", max_size=12), max_size=30).map(lambda parts: "\n".join(parts).encode())


@given(data=lines, size=st.integers(1, 40), cut=st.integers(0, 20))
def test_chunks_of_any_range_are_the_chunks_of_the_whole(tmp_path_factory, data, size, cut):
    path = tmp_path_factory.getbasetemp() / "chunks.txt"
    path.write_bytes(data)
    with open(path, "rb") as file:
        whole = list(read_chunks(file, size=size))
        parts = list(read_chunks(file, size=size, first=0, last=0))
        file.seek(0)
        parts += list(read_chunks(file, size=size, first=0, last=cut))
        file.seek(0)
        parts += list(read_chunks(file, size=size, first=cut)) if cut else whole
    assert b"".join(whole) == data
    assert parts == whole
    assert all(chunk.endswith(b"\n") for chunk in whole[:-1])


@given(texts=st.lists(st.text(max_size=20), max_size=20), cut=st.integers(0, 900))
def test_json_lines_of_two_ranges_are_the_lines_of_the_whole(tmp_path_factory, texts, cut):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"field": "text", "broken_lines": "raise", "counts": Counter()}
    first = list(read_json_lines(str(path), start=0, stop=cut, **options))
    second = list(read_json_lines(str(path), start=cut, stop=None, **options)) if cut else texts
    assert first + second == texts


def test_one_large_text_becomes_about_five_hundred_documents_on_auto(make_text, tmp_path, read_all):
    (tmp_path / "a.txt").write_text("a line of some length\n" * 50_000)
    documents = read_all(make_text(tmp_path / "a.txt", document_bytes="auto"))[0]
    assert 490 <= len(documents) <= 501
    assert b"".join(documents) == (tmp_path / "a.txt").read_bytes()


def test_many_files_are_not_cut_on_auto(make_text, tmp_path, read_all):
    for i in range(500):
        (tmp_path / f"{i:03}.txt").write_text(f"{i}\n" * 400)
    assert len(read_all(make_text(str(tmp_path / "*.txt"), document_bytes="auto"))[0]) == 500


def test_a_missing_file_is_named(make_text):
    with pytest.raises(DataError, match=r"data\.files=/nowhere/a\.txt: no such file"):
        make_text("/nowhere/a.txt").pieces()


def test_an_empty_file_is_named(make_text, tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"a\.txt: the file is empty"):
        make_text(tmp_path / "a.txt").pieces()


def test_a_glob_over_nothing_but_empty_files_is_refused(make_text, tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="every file is empty"):
        make_text(str(tmp_path / "*.txt")).pieces()


def test_a_glob_without_a_match_is_named(make_text, tmp_path):
    with pytest.raises(DataError, match=r"\*\.txt: the glob matches no file"):
        make_text(str(tmp_path / "*.txt")).pieces()


def test_the_error_for_a_folder_suggests_a_glob(make_text, tmp_path):
    with pytest.raises(DataError, match=r"is a folder; name its files with a glob such as .*\*\*/\*\.txt"):
        make_text(str(tmp_path)).pieces()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_binary_file_is_named(make_text, tmp_path, name):
    (tmp_path / name).write_bytes(b"ELF\0\1\2")
    with pytest.raises(DataError, match=rf"{name}: binary, not text \(zero byte at offset 3\)"):
        make_text(tmp_path / name).pieces()


def test_a_file_with_the_wrong_ending_is_named(make_text, tmp_path):
    (tmp_path / "a.txt.gz").write_text("not compressed")
    with pytest.raises(DataError, match=r"a\.txt\.gz: cannot be read"):
        make_text(tmp_path / "a.txt.gz").pieces()


def test_a_broken_table_is_named(make_text, tmp_path, read_all):
    (tmp_path / "a.parquet").write_text("no parquet at all")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet"):
        read_all(make_text(tmp_path / "a.parquet"))


@pytest.mark.parametrize("broken", ['{"text": "cut o', "[1, 2]", '{"text": 5}', "\udcff"])
def test_a_broken_line_is_named_by_file_and_number(make_text, write_lines, read_all, broken):
    path = write_lines(TEXTS)
    with open(path, "a", errors="surrogateescape") as file:
        file.write(broken + "\n" + '{"text": "after"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl: line 4 is broken .*data\.broken_lines=skip"):
        read_all(make_text(path))
    documents, counts = read_all(make_text(path, broken_lines="skip"))
    assert documents == [*TEXTS, "after"]
    assert counts == {"broken_lines": 1}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_the_error_for_a_missing_field_lists_the_fields(make_text, tmp_path, write_lines, read_all, kind):
    path = write_lines(TEXTS) if kind == "jsonl" else write_table(tmp_path, kind)
    with pytest.raises(DataError, match=r"data\.field=txt: not in .*; its fields are (id, )?text; did you mean text\?"):
        read_all(make_text(path, field="txt"))


def test_settings_out_of_range_are_refused(make_text):
    with pytest.raises(ConfigError, match=r"data\.broken_lines=ignore: unknown; choose raise or skip"):
        make_text("a", broken_lines="ignore")
    for value in (0, "all"):
        with pytest.raises(ConfigError, match=f"data.document_bytes={value}: must be at least 1"):
            make_text("a", document_bytes=value)


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_truncated_or_corrupt_compressed_file_is_named(make_text, write_lines, read_all, ending, damage):
    random = np.random.default_rng(0)
    path = compress(write_lines(["".join(map(str, random.integers(9, size=200))) for _ in range(400)]), ending)
    data = path.read_bytes()
    middle = len(data) * 3 // 4
    path.write_bytes(data[:middle] + (b"" if damage == "cut" else b"\xff" * 90 + data[middle + 90 :]))
    source = make_text(path)
    with pytest.raises(DataError, match=rf"corpus\.jsonl\{ending}: (cannot be read|line \d+ is broken)"):
        read_all(source)


def test_the_error_for_a_zst_file_with_a_large_window_names_the_package(make_text, tmp_path):
    if importlib.util.find_spec("zstandard") is not None:
        pytest.skip("zstandard reads it")
    path = tmp_path / "a.jsonl.zst"  # a frame header with a window of 2 GiB, as zstd --long=31 writes it
    path.write_bytes(bytes.fromhex("28b52ffd04a81c6200e2cf291790b90dab5a"))
    with pytest.raises(DataError, match=r"a window of 2048 MiB .*pip install zstandard, or .* zstd -d --long=31"):
        make_text(path).pieces()


def test_links_in_a_cycle_are_entered_once(make_text, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "t" / name).mkdir(parents=True)
        (tmp_path / "t" / name / "up").symlink_to("..")
        (tmp_path / "t" / name / "x.txt").write_text(name)
    (tmp_path / "t" / "other").symlink_to("a")
    (tmp_path / "t" / "book.txt").write_text("book")
    (tmp_path / "t" / ".hidden").mkdir()
    (tmp_path / "t" / ".hidden" / "no.txt").write_text("no")
    found = make_text(f"{tmp_path}/t/**/*.txt").files()
    assert [path.removeprefix(f"{tmp_path}/t/") for path in found] == ["a/x.txt", "b/x.txt", "book.txt"]
    assert make_text(f"{tmp_path}/t/**").files() == found


def test_a_corpus_of_one_line_is_cut_at_spaces(make_text, make_module, tmp_path, read_all):
    text = " ".join(f"word{i}" for i in range(200_000))
    (tmp_path / "a.txt").write_text(text)
    source = make_text(tmp_path / "a.txt", document_bytes="auto")
    documents = read_all(source)[0]
    assert b"".join(documents).decode() == text
    assert all(document.endswith(b" ") for document in documents[:-1])
    assert len(documents) > 400
    (tmp_path / "large.txt").write_text(text * 20)
    parts = read_all(make_text(tmp_path / "large.txt", document_bytes=1 << 16))[0]
    assert max(map(len, parts)) < 1 << 16  # no part is discarded for its long line
    module = make_module(source, max_line_bytes=1 << 16)
    module.prepare_data()
    assert module.report["long_lines"] == 0


def test_ranges_of_a_long_line_are_the_cuts_of_the_whole():
    data = ("é" * 5000 + " word" * 9000 + "\nshort line\n" + "中" * 9000).encode()
    whole = list(read_chunks(io.BytesIO(data), size=700))
    assert b"".join(whole) == data
    assert all(part.decode() for part in whole)
    for cut in (1, 7, 40, 90):
        parts = [
            *read_chunks(io.BytesIO(data), size=700, last=cut),
            *read_chunks(io.BytesIO(data), size=700, first=cut),
        ]
        assert parts == whole


def test_every_cell_of_a_csv_column_is_text(make_text, tmp_path, read_all):
    cells = ["NA", "null", "None", "nan", "007", "1e3", "2020-01-01", "true", "plain"]
    (tmp_path / "a.csv").write_text("text,n\n" + "".join(f"{cell},1\n" for cell in cells))
    assert read_all(make_text(tmp_path / "a.csv"))[0] == cells
    (tmp_path / "b.json").write_text(json.dumps([{"text": cell + " 00:00:00"} for cell in cells]))
    assert read_all(make_text(tmp_path / "b.json"))[0] == [cell + " 00:00:00" for cell in cells]


def test_a_deeply_nested_record_is_a_broken_line(make_text, write_lines, read_all):
    path = write_lines(TEXTS)
    with open(path, "a") as file:
        file.write('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(DataError, match=r"corpus\.jsonl: line 4 is broken \(nested too deeply\)"):
        read_all(make_text(path))
    assert read_all(make_text(path, broken_lines="skip")) == (TEXTS, {"broken_lines": 1})


def test_a_record_without_the_field_is_named_by_its_line_or_skipped(make_text, write_lines, read_all):
    path = write_lines(TEXTS)
    with open(path, "a") as file:
        file.write('{"txt": "misspelt"}\n{"text": "after"}\n')
    with pytest.raises(DataError, match=r"data\.field=text: not in .*its fields are txt.*\(line 4\)"):
        read_all(make_text(path))
    assert read_all(make_text(path, broken_lines="skip")) == ([*TEXTS, "after"], {"broken_lines": 1})
    with pytest.raises(DataError, match=r"data\.field=body: not in"):  # a misspelt setting is no broken line
        read_all(make_text(path, field="body", broken_lines="skip"))


def test_the_error_for_a_latin_1_corpus_names_the_conversion(make_text, make_module, tmp_path):
    (tmp_path / "a.txt").write_bytes("Übung macht den Meister, sagt man öfter.\n".encode("latin-1") * 3000)
    with pytest.raises(DataError, match=r"invalid_utf8.*; convert the files to UTF-8, for example with iconv"):
        make_module(make_text(tmp_path / "a.txt", document_bytes="auto")).prepare_data()
    (tmp_path / "b.txt").write_text("x" * 90_000 + "\n")
    with pytest.raises(DataError, match=r"1 long_lines.*; raise loader\.max_line_bytes, or set it to null"):
        make_module(make_text(tmp_path / "b.txt"), max_line_bytes=1000).prepare_data()
