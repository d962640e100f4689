import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import tokens
from data.tokens import ShardWriter, TokenStream, check_shard
from llm.errors import DataError


def write(path, ids, dtype=np.uint16):
    writer = ShardWriter(path, np.dtype(dtype))
    writer.write(np.array(ids))
    writer.close()
    return path, len(ids)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
def test_a_range_equals_the_same_range_of_the_concatenated_shards(tmp_path_factory, lengths, data):
    folder = tmp_path_factory.mktemp("shards")
    everything = np.arange(sum(lengths))
    parts = np.split(everything, np.cumsum(lengths)[:-1])
    stream = TokenStream([write(folder / f"{i}.bin", part) for i, part in enumerate(parts)], np.dtype(np.uint16))
    start = data.draw(st.integers(0, len(everything)))
    stop = data.draw(st.integers(start, len(everything)))
    assert len(stream) == len(everything)
    assert stream.read(start, stop).tolist() == everything[start:stop].tolist()


def test_a_range_inside_one_shard_is_a_view_of_the_memory_map(tmp_path):
    stream = TokenStream([write(tmp_path / "a.bin", range(100))], np.dtype(np.uint16))
    assert np.shares_memory(stream.read(3, 50), stream.read(40, 60))


def test_a_range_outside_the_stream_is_refused(tmp_path):
    stream = TokenStream([write(tmp_path / "a.bin", range(10))], np.dtype(np.uint16))
    with pytest.raises(IndexError, match=r"tokens 5\.\.11 of 10"):
        stream.read(5, 11)


def test_few_shards_are_open_at_a_time_and_only_paths_are_pickled(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_OPEN_SHARDS", 2)
    stream = TokenStream([write(tmp_path / f"{i}.bin", [i, i]) for i in range(5)], np.dtype(np.uint16))
    assert stream.read(0, 10).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len(stream._maps) == 2
    copy = pickle.loads(pickle.dumps(stream))
    assert len(copy._maps) == 0
    assert copy.read(3, 5).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_the_largest_id_of_each_type_survives(tmp_path, dtype):
    largest = np.iinfo(dtype).max
    stream = TokenStream([write(tmp_path / "a.bin", [0, largest], dtype)], np.dtype(dtype))
    assert stream.read(0, 2).tolist() == [0, largest]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


def recount(path):
    data = bytearray(path.read_bytes())
    data[16] ^= 1
    path.write_bytes(bytes(data))


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut, grow, recount, remove])
def test_a_corrupt_shard_is_refused(tmp_path, damage):
    path, count = write(tmp_path / "a.bin", range(10))
    check_shard(path, dtype=np.dtype(np.uint16), count=count)
    damage(path)
    with pytest.raises(DataError, match=r"a\.bin: (corrupt|cannot be read)"):
        check_shard(path, dtype=np.dtype(np.uint16), count=count)


def test_an_incomplete_shard_is_refused(tmp_path):
    writer = ShardWriter(tmp_path / "a.bin", np.dtype(np.uint16))
    writer.write(np.arange(10))
    writer.abandon()
    with pytest.raises(DataError, match="corrupt"):
        check_shard(tmp_path / "a.bin", dtype=np.dtype(np.uint16), count=10)
