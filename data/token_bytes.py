"""Counts the bytes of text that each entry of a vocabulary stands for."""

from collections.abc import Callable
from typing import Any

from data.fast_bpe import byte_of_character
from llm.errors import ConfigError


def measure_for(spec: dict[str, Any]) -> Callable[[str], int]:
    """Return the function that counts the bytes of a vocabulary entry, for the content of a `tokenizer.json`.

    Raises:
        ConfigError: the tokenizer is neither byte-level nor made by SentencePiece, so its tokens do not give back the
            text.
    """
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


def unknown_id(spec: dict[str, Any]) -> int | None:
    """Return the id of the token for unknown text, or None where there is none."""
    model = spec["model"]
    if model["type"] == "Unigram":
        return model.get("unk_id")
    return model.get("vocab", {}).get(model.get("unk_token"))


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _types(node: Any) -> set[str]:
    """Return the `type` of every step in a part of a `tokenizer.json`."""
    if isinstance(node, list):
        return set().union(*map(_types, node))
    if not isinstance(node, dict):
        return set()
    return {str(node.get("type"))}.union(*(_types(child) for child in node.values()))
