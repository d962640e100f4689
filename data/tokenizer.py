"""Text to ids and back: bytes, a byte-level BPE trained on the corpus, or a tokenizer file made elsewhere.

Every document begins with one special token, `bos_id`, which also tells that the document before it has ended. Text
that looks like a special token is encoded as the ordinary text it is.
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, SupportsInt

import numpy as np

from data.fast_bpe import byte_of_character, compile_fast
from data.sources import hash_settings
from llm.errors import ConfigError, DataError

BOS_TOKEN = "<|endoftext|>"
_BOS_NAMES = (BOS_TOKEN, "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "</s>", "<eos>")
_FILE = "tokenizer.json"
_PARALLELISM = "TOKENIZERS_PARALLELISM"


class ByteTokenizer:
    """One id a byte, and 256 for the beginning of a document: nothing to train, nothing unknown."""

    is_trained = True
    has_one_token_a_byte: ClassVar[bool] = True
    vocab_size = 257
    bos_id = 256

    def settings(self) -> dict[str, Any]:
        """Return what names the tokenizer before it is trained."""
        return {"kind": "bytes"}

    def fingerprint(self) -> str:
        """Return a name for the mapping from text to ids."""
        return hash_settings(self.settings())

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes each id stands for, an int64 array of `vocab_size`; 0 for `bos_id`."""
        return np.append(np.ones(256, np.int64), 0)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, without `bos_id`."""
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, without `bos_id`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Return the text of ids; `bos_id` becomes the empty string, broken UTF-8 the replacement character."""
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`: the same ids as a byte-level BPE without merges, which other software reads."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        vocab = byte_of_character() | {BOS_TOKEN: self.bos_id}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(BOS_TOKEN, special=True)])
        _write(folder, tokenizer.to_str())


class _FileTokenizer:
    """What trained and pretrained tokenizers share: everything about a `tokenizers.Tokenizer` that is there."""

    has_one_token_a_byte: ClassVar[bool] = False
    bos_token: str | None = None
    allows_fast = True
    """Set to False to encode with `tokenizers` alone."""
    _json: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_tokenizer", "_fast", "token_bytes")}

    @property
    def is_trained(self) -> bool:
        """Whether there are ids yet."""
        return self._json is not None

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        if self._json is None:
            raise DataError("tokenizer: not trained yet; call TokenDataModule.prepare_data() first")
        tokenizer = Tokenizer.from_str(self._json)
        tokenizer.encode_special_tokens = True  # `<|endoftext|>` inside a document is text like any other
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    @functools.cached_property
    def _fast(self) -> Any:
        return compile_fast(self._tokenizer) if self.allows_fast else None

    def verify_fast(self, sample: Sequence[str]) -> bool:
        """Keep the fast engine only if it gives the same ids on every text of the sample; say whether it is kept."""
        self.__dict__["_fast"] = compile_fast(self._tokenizer, sample) if self.allows_fast else None
        self.allows_fast = self._fast is not None
        return self.allows_fast

    @property
    def vocab_size(self) -> int:
        """Number of ids: one more than the largest."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def bos_id(self) -> int:
        """The id that begins every document."""
        names = _BOS_NAMES if self.bos_token is None else (self.bos_token,)
        for name in names:
            if (token_id := self._tokenizer.token_to_id(name)) is not None:
                return token_id
        special = [t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special]
        raise ConfigError(
            f"tokenizer.bos_token={self.bos_token}: not in the vocabulary; its special tokens are {', '.join(special)}"
        )

    def fingerprint(self) -> str:
        """Return a name for the mapping from text to ids."""
        return hash_settings([json.loads(self._json or "null"), self.bos_id])

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes each id stands for, an int64 array of `vocab_size`; 0 for special tokens."""
        sizes = np.zeros(self.vocab_size, np.int64)
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        measure = _measure_for(json.loads(self._json or "null"))
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            sizes[i] = 0 if i in special else measure(token)
        sizes[self.bos_id] = 0
        return sizes

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, without `bos_id`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, without `bos_id`."""
        if self._fast is not None:
            return [self._fast.encode(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Return the text of ids; special tokens become the empty string."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, which `tokenizers` and `transformers` read."""
        _write(folder, self._json or self._tokenizer.to_str())


class BpeTokenizer(_FileTokenizer):
    """A byte-level BPE trained once on a sample of the training split; every text has ids, and they give it back.

    Args:
        vocab_size: Ids, with the 256 bytes and one special token; at least 257.
        sample_bytes: Bytes of training text that the merges are learnt from, spread over the corpus.

    Source: Sennrich, Haddow and Birch 2016 (arXiv:1508.07909), algorithm 1, on bytes as in Radford et al. 2019
    (GPT-2), section 2.2, with its split into words.
    """

    bos_token = BOS_TOKEN

    def __init__(self, *, vocab_size: int, sample_bytes: int):
        if vocab_size < 257:
            raise ConfigError(f"tokenizer.vocab_size={vocab_size}: 256 bytes and one special token need 257; raise it")
        if sample_bytes < 1:
            raise ConfigError(f"tokenizer.sample_bytes={sample_bytes}: must be at least 1; 16777216 is usual")
        self.requested_vocab_size = vocab_size
        self.sample_bytes = sample_bytes

    def settings(self) -> dict[str, Any]:
        """Return what names the tokenizer before it is trained."""
        return {"kind": "bpe", "vocab_size": self.requested_vocab_size, "sample_bytes": self.sample_bytes}

    def train(self, texts: Iterator[str]) -> None:
        """Learn the merges; uses all cores unless TOKENIZERS_PARALLELISM says otherwise.

        Raises:
            DataError: the text is too little for so many tokens.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.requested_vocab_size,
            special_tokens=[BOS_TOKEN],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        # Data loader workers are forked later; its threads do not survive that, and only this keeps it silent.
        os.environ.setdefault(_PARALLELISM, "false")
        found = tokenizer.get_vocab_size(with_added_tokens=True)
        if found < self.requested_vocab_size:
            raise DataError(
                f"tokenizer.vocab_size={self.requested_vocab_size}: the text gives only {found} tokens; "
                "lower it, or use tokenizer=bytes"
            )
        self.load(tokenizer.to_str())

    def load(self, text: str) -> None:
        """Take the content of a `tokenizer.json` that `save` wrote."""
        self._json = text
        for name in ("_tokenizer", "_fast", "token_bytes", "bos_id"):
            self.__dict__.pop(name, None)


class PretrainedTokenizer(_FileTokenizer):
    """A tokenizer made elsewhere, so that results compare with models that use it.

    Args:
        path: A `tokenizer.json`, a folder that holds one, or a model's name on the Hugging Face hub.
        bos_token: The special token that begins a document; None finds the usual ones.

    Raises:
        ConfigError: nothing readable at `path`, or no such special token.
    """

    def __init__(self, *, path: str, bos_token: str | None):
        self.bos_token = bos_token
        self._json = _read(path)
        _measure_for(json.loads(self._json))
        if self.bos_id >= self.vocab_size:
            raise ConfigError(f"tokenizer.path={path}: its special token has no id; name one with tokenizer.bos_token")

    def settings(self) -> dict[str, Any]:
        """Return what names the tokenizer."""
        return {"kind": "pretrained", "fingerprint": self.fingerprint()}


def _read(path: str) -> str:
    file = Path(path).expanduser()
    file = file / _FILE if file.is_dir() else file
    try:
        if not file.is_file():
            if os.path.exists(path) or path.endswith(".json") or path.startswith((".", "/", "~")):
                raise FileNotFoundError(f"no {file}")
            import huggingface_hub

            file = Path(huggingface_hub.hf_hub_download(path, _FILE))
        from tokenizers import Tokenizer

        return Tokenizer.from_str(file.read_text(encoding="utf-8")).to_str()
    except Exception as error:  # `tokenizers` raises bare Exception, the hub a dozen kinds
        raise ConfigError(
            f"tokenizer.path={path}: cannot be read ({type(error).__name__}: {error}); "
            "give a tokenizer.json, its folder, or a name on the hub"
        ) from error


def _write(folder: str | Path, text: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    temporary = Path(folder) / f".{_FILE}.{os.getpid()}"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, Path(folder) / _FILE)


def _measure_for(spec: dict[str, Any]) -> Any:
    """Return the function that counts the bytes a vocabulary entry stands for."""
    kinds = {spec["model"]["type"], *_types(spec.get("pre_tokenizer")), *_types(spec.get("decoder"))}
    if "ByteLevel" in kinds:
        table = byte_of_character()
        return lambda token: len(token) if all(c in table for c in token) else len(token.encode("utf-8"))
    if kinds & {"Metaspace", "ByteFallback"}:
        return lambda token: 1 if _is_byte(token) else len(token.replace("▁", " ").encode("utf-8"))
    raise ConfigError(
        f"tokenizer: a {spec['model']['type']} tokenizer whose tokens do not give back the text; "
        "use one that is byte-level or made by SentencePiece"
    )


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _types(node: Any) -> set[str]:
    if isinstance(node, list):
        return set().union(*map(_types, node))
    if not isinstance(node, dict):
        return set()
    return {str(node.get("type"))}.union(*(_types(child) for child in node.values()))
