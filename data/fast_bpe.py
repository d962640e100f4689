"""Runs a byte-level BPE on tiktoken's faster engine, with the merges of a `tokenizers` file.

The `tokenizers` form defines the ids. The fast form is used only where its construction is known to give the same
ids, and only after it has reproduced those of a sample.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

# GPT-2's split, first as published and then with possessive quantifiers: equal pieces, less backtracking.
_GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CANARY = (
    "def f(x):\n\treturn x  # don't  stop\r\n\n   'quoted' we'll they've 12345 3.14 "
    "naïve Ελληνικά 中文字 한국어 \u00a0\u2003 e\u0301 🙂👩‍👩‍👧 <|endoftext|> \x00\x7f    \n\n\n  end   "
)


def byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def compile_fast(tokenizer: Any, sample: Sequence[str] = ()) -> "FastBpe | None":
    """Return the fast form of a `tokenizers.Tokenizer`, or None where it would give other ids."""
    spec = json.loads(tokenizer.to_str())
    split = _split_pattern(spec)
    if split is None or not _is_plain_bpe(spec):
        return None
    try:
        fast = FastBpe(split, spec["model"])
        texts = [_CANARY, *sample]
        return (
            fast
            if all(fast.encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
            else None
        )
    except (ImportError, KeyError, ValueError):
        return None


def _is_plain_bpe(spec: dict[str, Any]) -> bool:
    model = spec["model"]
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    return (
        model["type"] == "BPE"
        and not any(model.get(option) for option in options)
        and spec.get("normalizer") is None
        and all(token["special"] for token in spec["added_tokens"])
    )


def _split_pattern(spec: dict[str, Any]) -> str | None:
    """Return the pattern that splits text into words; None unless the pre-tokenizer is byte-level with one split."""
    steps = spec.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1:
        return _GPT2_SPLIT if steps[0]["use_regex"] else None
    split = steps[0]
    if len(steps) > 2 or split["type"] != "Split" or split["behavior"] != "Isolated" or split["invert"]:
        return None
    return None if steps[1]["use_regex"] else split["pattern"].get("Regex")


class FastBpe:
    """An encoder on tiktoken's engine, with ranks for ids: ranks 0..255 are the bytes, then come the merges in order.

    Raises:
        ImportError: tiktoken is not installed.
        KeyError, ValueError: the vocabulary is not byte-level BPE.
    """

    def __init__(self, split: str, model: dict[str, Any]):
        import tiktoken

        bytes_of = byte_of_character()
        ids = {
            bytes(bytes_of[c] for c in token): i
            for token, i in model["vocab"].items()
            if all(c in bytes_of for c in token)
        }
        words = [bytes([byte]) for byte in range(256)]
        for merge in model["merges"]:
            pair = merge.split(" ") if isinstance(merge, str) else merge
            words.append(bytes(bytes_of[c] for c in "".join(pair)))
        ranks = {word: rank for rank, word in enumerate(words)}
        if len(ranks) != len(words):
            raise ValueError("two merges give the same token")
        self.ids = np.array([ids[word] for word in words], dtype=np.uint32)
        self.engine = tiktoken.Encoding(
            "bpe", pat_str=split, mergeable_ranks=ranks, special_tokens={"<|no text|>": len(words)}
        )

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, in which nothing is a special token."""
        return self.ids[self.engine.encode_to_numpy(text, disallowed_special=())]
