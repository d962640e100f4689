import argparse
import inspect
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from data.fast_bpe import compile_fast
from data.tokenizer import BpeTokenizer, ByteTokenizer, PretrainedTokenizer
from llm.errors import ConfigError, DataError

SPECIAL = "<|endoftext|>"
any_text = st.text() | st.text(alphabet="ab \n\t'stldé1中", max_size=60)


@pytest.fixture(scope="module")
def bpe():
    tokenizer = BpeTokenizer(vocab_size=400, sample_bytes=1 << 20)
    tokenizer.train(iter([inspect.getsource(argparse), "中文字 ελληνικά naïve we'll don't\r\n" * 9]))
    return tokenizer


@pytest.fixture(scope="module")
def both(bpe):
    return {"bytes": ByteTokenizer(), "bpe": bpe}


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@given(text=any_text)
def test_decoding_gives_the_text_back(both, kind, text):
    ids = both[kind].encode(text)
    assert both[kind].decode(ids) == text
    assert all(0 <= i < both[kind].vocab_size and i != both[kind].bos_id for i in ids)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@given(text=any_text)
def test_token_bytes_add_up_to_the_bytes_of_the_text(both, kind, text):
    assert both[kind].token_bytes[both[kind].encode(text)].sum() == len(text.encode())
    assert both[kind].token_bytes[both[kind].bos_id] == 0


@given(text=any_text)
def test_the_fast_engine_gives_the_ids_of_the_definition(bpe, text):
    assert bpe._fast is not None
    assert bpe._fast.encode(text).tolist() == bpe._tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["x" * 100_000, " " * 100_000, "\n" * 100_000, "中" * 30_000, "ab" * 50_000])
def test_the_fast_engine_gives_the_ids_of_the_definition_on_long_runs(bpe, text):
    assert bpe._fast.encode(text).tolist() == bpe._tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("allows_fast", [True, False])
def test_special_text_in_a_document_is_ordinary_text(bpe, allows_fast):
    tokenizer = pickle.loads(pickle.dumps(bpe))
    tokenizer.allows_fast = allows_fast
    ids = tokenizer.encode(f"a{SPECIAL}b")
    assert tokenizer.bos_id not in ids
    assert tokenizer.decode(ids) == f"a{SPECIAL}b"


def test_a_pickled_tokenizer_gives_the_same_ids(bpe):
    copy = pickle.loads(pickle.dumps(bpe))
    assert copy.encode("don't stop").tolist() == bpe.encode("don't stop").tolist()
    assert copy.fingerprint() == bpe.fingerprint()


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@given(text=any_text)
def test_a_saved_tokenizer_read_as_pretrained_gives_the_same_ids(both, kind, text, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / kind
    if not folder.exists():
        both[kind].save(folder)
    loaded = PretrainedTokenizer(path=str(folder), bos_token=None)
    assert loaded.encode(text).tolist() == both[kind].encode(text).tolist()
    assert (loaded.vocab_size, loaded.bos_id) == (both[kind].vocab_size, both[kind].bos_id)
    assert np.array_equal(loaded.token_bytes, both[kind].token_bytes)


def test_the_fast_engine_is_not_used_after_a_wrong_sample(bpe, monkeypatch):
    from data import fast_bpe

    tokenizer = pickle.loads(pickle.dumps(bpe))
    assert tokenizer.verify_fast(["fine"])
    monkeypatch.setattr(fast_bpe, "_GPT2_SPLIT", r"\p{L}+|[^\p{L}]")
    assert not tokenizer.verify_fast(["fine"])
    assert tokenizer.encode("don't stop").tolist() == bpe.encode("don't stop").tolist()
    assert pickle.loads(pickle.dumps(tokenizer))._fast is None


def llama_style(bpe):
    """Another split, added before a byte-level step without its own: the layout of Llama 3 and Qwen."""
    tokenizer = Tokenizer.from_str(bpe._json)
    tokenizer.encode_special_tokens = True
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def test_the_fast_engine_uses_the_split_of_the_file(bpe):
    tokenizer = llama_style(bpe)
    fast = compile_fast(tokenizer)
    assert fast is not None
    text = "function(self) 123456 don't\n\n naïve 中文字"
    assert fast.encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_the_fast_engine_is_not_used_for_unsupported_tokenizers(bpe):
    spec = json.loads(bpe._json)
    for change in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": {"type": "Whitespace"}}):
        assert compile_fast(Tokenizer.from_str(json.dumps(spec | change))) is None


def test_a_sentencepiece_tokenizer_counts_its_bytes(tmp_path):
    vocab = {"<s>": 0, "▁a": 1, "é": 2, "<0x0A>": 3, "<unk>": 4, "▁": 5, "a": 6}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<s>", "<unk>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = PretrainedTokenizer(path=str(tmp_path / "tokenizer.json"), bos_token="<s>")
    assert loaded.token_bytes.tolist() == [-1, 2, 2, 1, 0, 1, 1]


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "<s>": 1}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="a WordPiece tokenizer whose tokens do not give back the text"):
        PretrainedTokenizer(path=str(tmp_path), bos_token=None)


def test_the_error_for_an_unknown_special_token_lists_the_special_tokens(bpe, tmp_path):
    bpe.save(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer\.bos_token=<bos>: not in the vocabulary; .* are <\|endoftext\|>"):
        PretrainedTokenizer(path=str(tmp_path), bos_token="<bos>")


@pytest.mark.parametrize("content", [None, "no json", "{}"])
def test_an_unreadable_tokenizer_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.path=.*: cannot be read"):
        PretrainedTokenizer(path=str(tmp_path), bos_token=None)


def test_training_again_gives_the_same_tokenizer(bpe):
    again = BpeTokenizer(vocab_size=400, sample_bytes=1 << 20)
    again.train(iter([inspect.getsource(argparse), "中文字 ελληνικά naïve we'll don't\r\n" * 9]))
    assert again.fingerprint() == bpe.fingerprint()


def test_too_little_text_for_the_vocabulary_is_refused():
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size=5000: the text gives only \d+ tokens"):
        BpeTokenizer(vocab_size=5000, sample_bytes=1 << 20).train(iter(["too little"]))


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size=256: .*257"):
        BpeTokenizer(vocab_size=256, sample_bytes=1)


def test_an_untrained_tokenizer_is_reported():
    with pytest.raises(DataError, match="not trained yet"):
        BpeTokenizer(vocab_size=300, sample_bytes=1).encode("a")
