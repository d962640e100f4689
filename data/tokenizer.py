"""Converts text to ids and back: bytes, a byte-level BPE trained on the corpus, or a tokenizer file made elsewhere.

Every document begins with one special token, `bos_id`, which also marks the end of the document before it. Text that
looks like a special token is encoded as ordinary text.
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, SupportsInt

import numpy as np

from data.fast_bpe import byte_of_character
from data.file_tokenizer import TOKENIZER_FILE, FileTokenizer, with_special_separator, write_tokenizer
from data.sources import hash_settings
from data.token_bytes import measure_for
from llm.errors import ConfigError, DataError

BOS_TOKEN = "<|endoftext|>"
_PARALLELISM = "TOKENIZERS_PARALLELISM"


class ByteTokenizer:
    """One id per byte, and 256 for the beginning of a document; it needs no training and knows every text."""

    is_trained = True
    is_lossless = True
    has_one_token_a_byte: ClassVar[bool] = True
    vocab_size = 257
    bos_id = 256

    def settings(self) -> dict[str, Any]:
        """Return the settings that name the tokenizer before it is trained."""
        return {"kind": "bytes"}

    def fingerprint(self) -> str:
        """Return a name for the mapping from text to ids."""
        return hash_settings(self.settings())

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes that each id stands for, an int64 array of `vocab_size`; 0 for `bos_id`."""
        return np.append(np.ones(256, np.int64), 0)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, without `bos_id`."""
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, without `bos_id`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Return the text of ids. `bos_id` becomes the empty string, and invalid UTF-8 the replacement character."""
        return bytes(i for i in map(int, ids) if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` with the same ids as a byte-level BPE without merges, which other software reads."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        vocab = byte_of_character() | {BOS_TOKEN: self.bos_id}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(BOS_TOKEN, special=True)])
        write_tokenizer(folder, tokenizer.to_str())


class BpeTokenizer(FileTokenizer):
    """A byte-level BPE that is trained once on a sample of the training split, and loses no text.

    Args:
        vocab_size: number of ids, including the 256 bytes and one special token; at least 257.
        sample_bytes: bytes of training text from which the merges are learnt, spread over the corpus.

    Raises:
        ConfigError: a value is out of its range.

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
        """Return the settings that name the tokenizer before it is trained."""
        return {"kind": "bpe", "vocab_size": self.requested_vocab_size, "sample_bytes": self.sample_bytes}

    def train(self, texts: Iterator[str]) -> None:
        """Learn the merges, on all cores unless TOKENIZERS_PARALLELISM is false.

        Raises:
            DataError: the text is too short for so many tokens.
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
        # Data loader workers are forked later, which its threads do not survive; this setting avoids its warning.
        os.environ.setdefault(_PARALLELISM, "false")
        found = tokenizer.get_vocab_size(with_added_tokens=True)
        if found < self.requested_vocab_size:
            raise DataError(
                f"tokenizer.vocab_size={self.requested_vocab_size}: the text gives only {found} tokens; "
                "lower it, or use tokenizer=bytes"
            )
        self.load(tokenizer.to_str())

    def load(self, text: str) -> None:
        """Take over the content of a `tokenizer.json` that `save` wrote."""
        self._json = text
        for name in ("_tokenizer", "_fast", "token_bytes", "bos_id", "_spelling"):
            self.__dict__.pop(name, None)


class PretrainedTokenizer(FileTokenizer):
    """A tokenizer made elsewhere, whose results can be compared with those of models that use it.

    Args:
        path: a `tokenizer.json`, a folder that contains one, or a model's name on the Hugging Face hub.
        bos_token: the special token that begins a document; None finds the usual ones. An ordinary added token is
            made special.

    Raises:
        ConfigError: nothing at `path` can be read, or it has no such special token.
    """

    def __init__(self, *, path: str, bos_token: str | None):
        self.bos_token = bos_token
        self._json = with_special_separator(_read(path), bos_token)
        measure_for(json.loads(self._json))
        if self.bos_id >= self.vocab_size:
            raise ConfigError(
                f"tokenizer.path={path}: its special token has no id; name another with tokenizer.bos_token"
            )

    def settings(self) -> dict[str, Any]:
        """Return the settings that name the tokenizer."""
        return {"kind": "pretrained", "fingerprint": self.fingerprint()}


def _read(path: str) -> str:
    file = Path(path).expanduser()
    file = file / TOKENIZER_FILE if file.is_dir() else file
    try:
        if not file.is_file():
            if os.path.exists(path) or path.endswith(".json") or path.startswith((".", "/", "~")):
                raise FileNotFoundError(f"no {file}")
            import huggingface_hub

            file = Path(huggingface_hub.hf_hub_download(path, TOKENIZER_FILE))
        from tokenizers import Tokenizer

        return Tokenizer.from_str(file.read_text(encoding="utf-8")).to_str()
    except Exception as error:  # `tokenizers` raises bare Exception, the hub a dozen kinds
        raise ConfigError(
            f"tokenizer.path={path}: cannot be read ({type(error).__name__}: {error}); "
            "give a tokenizer.json, its folder, or a name on the hub"
        ) from error
