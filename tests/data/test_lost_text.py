"""Text that a tokenizer loses, separators inside text, and the bytes that bits per byte count."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from data.tokenizer import BpeTokenizer, PretrainedTokenizer
from data.worker import lost_characters
from llm.errors import ConfigError, DataError

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,<>/"


@pytest.fixture
def unigram(tmp_path):
    """Return a Unigram tokenizer of single characters without byte fallback, in a file."""

    def make(normalizer=None) -> PretrainedTokenizer:
        words = [("<unk>", 0.0), ("<s>", 0.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS)]
        tokenizer = Tokenizer(models.Unigram(words, unk_id=0, byte_fallback=False))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        tokenizer.add_special_tokens(["<unk>", "<s>"])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return PretrainedTokenizer(path=str(tmp_path), bos_token=None)

    return make


def documents(foreign: float) -> list[str]:
    """Documents of which about this share of the bytes is Chinese."""
    count = round(foreign * 1000 / 3)
    return [f"{i} " + "".join("中" if j < count else "a" for j in range(1000 - 2 * count)) for i in range(40)]


def test_a_tokenizer_that_loses_more_than_five_percent_is_refused(unigram, make_text, write_lines, make_module):
    with pytest.raises(DataError, match=r"tokenizer: 9\.\d+% of the text's bytes are lost .* most often '中'"):
        make_module(make_text(write_lines(documents(0.1))), tokenizer=unigram()).prepare_data()
    with pytest.raises(DataError, match=r"tokenizer: 100\.00% of .*use tokenizer=bytes"):
        make_module(make_text(write_lines(["中文" * i for i in range(9, 60)])), tokenizer=unigram()).prepare_data()


def test_a_tokenizer_that_loses_a_little_is_warned_of_at_every_start(
    unigram, make_text, write_lines, make_module, caplog
):
    for _ in range(2):
        caplog.clear()
        module = make_module(make_text(write_lines(documents(0.02))), tokenizer=unigram())
        module.prepare_data()
        assert "% of the text's bytes are lost" in caplog.text
    assert 0.01 < module.report["lost_bytes"] / module.report["bytes"] < 0.03
    caplog.clear()
    module = make_module(make_text(write_lines(documents(0.0))), tokenizer=unigram())
    module.prepare_data()
    assert module.report["lost_bytes"] == 0
    assert "lost" not in caplog.text


def test_characters_that_a_normaliser_changes_count_as_lost(unigram):
    tokenizer = unigram(normalizers.Lowercase())
    lost = lost_characters(tokenizer, ["Aha a"], tokenizer.encode_batch(["Aha a"]))
    assert lost == {"A": 1}


def test_byte_level_tokenizers_lose_nothing_and_are_not_decoded(monkeypatch):
    tokenizer = BpeTokenizer(vocab_size=260, sample_bytes=1000)
    tokenizer.train(iter(["some text some text"] * 9))
    monkeypatch.setattr(BpeTokenizer, "decode", None)
    assert not lost_characters(tokenizer, ["中"], tokenizer.encode_batch(["中"]))


def added(tmp_path, *, special: bool) -> str:
    tokenizer = BpeTokenizer(vocab_size=260, sample_bytes=1000)
    tokenizer.train(iter(["the text and the text"] * 9))
    spec = json.loads(tokenizer._json)
    spec["added_tokens"][0]["special"] = special
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    return str(tmp_path)


def test_an_ordinary_added_token_as_the_separator_never_comes_out_of_text(tmp_path):
    text = "a<|endoftext|>b"
    ordinary = PretrainedTokenizer(path=added(tmp_path, special=False), bos_token="<|endoftext|>")
    ids = ordinary.encode(text)
    assert ordinary.bos_id not in ids
    assert ordinary.decode(ids) == text
    special = PretrainedTokenizer(path=added(tmp_path, special=True), bos_token=None)
    assert special.encode(text).tolist() == ids.tolist()


def test_a_separator_in_the_models_vocabulary_is_encoded_as_characters(unigram):
    tokenizer = unigram()
    ids = tokenizer.encode("a <s> b<s>")
    assert tokenizer.bos_id not in ids
    assert tokenizer.decode(ids) == "a <s> b<s>"


def test_an_ordinary_word_is_no_separator(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.bos_token=t: an ordinary token, .* special tokens are <\|endof"):
        PretrainedTokenizer(path=added(tmp_path, special=True), bos_token="t")


@pytest.mark.parametrize("kind", ["metaspace", "prepend", "byte_level"])
def test_token_bytes_of_whole_documents_are_the_bytes_of_the_source(kind, tmp_path):
    texts = ["one line", "two", "a b c"]
    vocab = {t: i for i, t in enumerate(["<s>", "Ġ" if kind == "byte_level" else "▁", *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    if kind == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "metaspace":
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = PretrainedTokenizer(path=str(tmp_path), bos_token="<s>")
    ids = np.concatenate([np.append(loaded.bos_id, loaded.encode(text)) for text in texts])
    assert loaded.token_bytes[ids].sum() == sum(len(text) for text in texts)
    assert not lost_characters(loaded, texts, loaded.encode_batch(texts))
