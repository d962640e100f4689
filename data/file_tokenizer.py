"""Wraps a `tokenizers.Tokenizer`: the base class of trained and pretrained tokenizers."""

import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, SupportsInt

import numpy as np

from data.fast_bpe import byte_of_character, compile_fast
from data.sources import hash_settings
from data.token_bytes import measure_for, unknown_id
from llm.errors import ConfigError, DataError

TOKENIZER_FILE = "tokenizer.json"
_SEPARATORS = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>", "</s>", "<eos>")
"""Usual names of the token that begins a document, in the order in which they are looked for."""
_PROBES = "aetn0A"


class FileTokenizer:
    """A tokenizer that the content of a `tokenizer.json` defines."""

    has_one_token_a_byte: ClassVar[bool] = False
    bos_token: str | None = None
    allows_fast = True
    """Set to False to encode with `tokenizers` alone."""
    _json: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_tokenizer", "_fast", "token_bytes", "_spelling")}

    @property
    def is_trained(self) -> bool:
        """Whether there are ids yet."""
        return self._json is not None

    @property
    def is_lossless(self) -> bool:
        """Whether decoding is known to return every text unchanged."""
        return self._fast is not None

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        if self._json is None:
            raise DataError("tokenizer: not trained yet; call TokenDataModule.prepare_data() first")
        tokenizer = Tokenizer.from_str(self._json)
        tokenizer.encode_special_tokens = True  # `<|endoftext|>` inside a document is ordinary text
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    @functools.cached_property
    def _fast(self) -> Any:
        return compile_fast(self._tokenizer) if self.allows_fast else None

    def verify_fast(self, sample: Sequence[str]) -> bool:
        """Keep the fast engine only if it gives the same ids on every text of the sample; return whether it is kept."""
        self.__dict__["_fast"] = compile_fast(self._tokenizer, sample) if self.allows_fast else None
        self.allows_fast = self._fast is not None
        return self.allows_fast

    @property
    def vocab_size(self) -> int:
        """Number of ids: one more than the largest."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def bos_id(self) -> int:
        """The id that begins every document: a special token, which `encode` never returns."""
        added = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        names = _SEPARATORS if self.bos_token is None else (self.bos_token,)
        for name in names:
            if name in added:
                return added[name]
        is_word = self.bos_token is not None and self._tokenizer.token_to_id(self.bos_token) is not None
        state = "an ordinary token, which text contains too" if is_word else "not in the vocabulary"
        raise ConfigError(f"tokenizer.bos_token={self.bos_token}: {state}; its special tokens are {', '.join(added)}")

    def fingerprint(self) -> str:
        """Return a name for the mapping from text to ids."""
        return hash_settings([json.loads(self._json or "null"), self.bos_id])

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes that each id stands for, an int64 array of `vocab_size`; 0 for special and unknown tokens.

        Many tokenizers put a space before each text. The entry of `bos_id` is then -1, since each document has one
        `bos_id`: the sum over a document with its `bos_id` is the number of bytes of the source.
        """
        sizes = np.zeros(self.vocab_size, np.int64)
        spec = json.loads(self._json or "null")
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        special |= {self.bos_id, unknown_id(spec)}
        measure = measure_for(spec)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            sizes[i] = 0 if i in special else measure(token)
        sizes[self.bos_id] = -self._bytes_before_text(sizes)
        return sizes

    def _bytes_before_text(self, sizes: np.ndarray) -> int:
        """Return the bytes that the tokenizer puts before each text, from a character that it knows."""
        for probe in _PROBES:
            ids = self.encode(probe)
            if self.decode(ids).lstrip(" ") == probe:
                return max(int(sizes[ids].sum()) - 1, 0)
        return 0

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, without `bos_id`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, without `bos_id`."""
        if self._fast is not None:
            encoded = [self._fast.encode(text) for text in texts]
        else:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            encoded = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return [self._without_separator(ids) for ids in encoded]

    def _without_separator(self, ids: np.ndarray) -> np.ndarray:
        """Spell out the separator where the model itself has it as a word, as Unigram models do."""
        places = np.flatnonzero(ids == self.bos_id)
        if not len(places):
            return ids
        parts = np.split(ids, places)
        return np.concatenate([parts[0], *(part for rest in parts[1:] for part in (self._spelling, rest[1:]))])

    @functools.cached_property
    def _spelling(self) -> np.ndarray:
        """The separator's text as one token per character."""
        names = {byte: character for character, byte in byte_of_character().items()}
        find = self._tokenizer.token_to_id
        ids: list[int | None] = []
        for character in self._tokenizer.id_to_token(self.bos_id):
            known = find(character)
            data = character.encode()
            own = [known] if known is not None else [find(f"<0x{b:02X}>") for b in data]
            ids += own if None not in own else [find(names[b]) for b in data]
        unknown = unknown_id(json.loads(self._json or "null"))
        return np.array([unknown if i is None else i for i in ids if i is not None or unknown is not None], np.uint32)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Return the text of ids; special tokens become the empty string."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, which `tokenizers` and `transformers` read."""
        write_tokenizer(folder, self._json or self._tokenizer.to_str())


def with_special_separator(content: str, bos_token: str | None) -> str:
    """Return the content of a `tokenizer.json` in which the separator is special where it was an ordinary added token.

    An ordinary added token is cut out of text wherever it occurs, so a text could begin a document in its middle.
    """
    spec = json.loads(content)
    added = {token["content"]: token for token in spec.get("added_tokens") or []}
    name = next((name for name in (_SEPARATORS if bos_token is None else (bos_token,)) if name in added), None)
    if name is None or added[name]["special"]:
        return content
    added[name]["special"] = True
    return json.dumps(spec, ensure_ascii=False)


def write_tokenizer(folder: str | Path, content: str) -> None:
    """Write `tokenizer.json` to a folder with one rename."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    temporary = Path(folder) / f".{TOKENIZER_FILE}.{os.getpid()}"
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, Path(folder) / TOKENIZER_FILE)
