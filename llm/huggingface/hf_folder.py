"""Reads and writes Hugging Face folders: weights in safetensors, config.json and the tokenizer."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm.errors import CheckpointError
from llm.run_folder.atomic_files import use_default_mode

CONFIG, WEIGHTS, INDEX, TOKENIZER = "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"


@runtime_checkable
class SavedTokenizer(Protocol):
    """A tokenizer that writes tokenizer.json."""

    bos_id: int

    def save(self, folder: Path) -> None:
        """Write tokenizer.json to a folder."""
        ...


def is_hf_folder(folder: Path) -> bool:
    """Return whether a folder has a configuration and weights in Hugging Face's layout."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Return the contents of config.json.

    Raises:
        CheckpointError: the file is missing or corrupt.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unusable(folder, f"{CONFIG} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise _unusable(folder, f"{CONFIG} is not a JSON object")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return all weights by name, from one file or from the files that the index lists.

    Raises:
        CheckpointError: a file is missing or corrupt, or the index names a file outside the folder.
    """
    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise _unusable(folder, f"neither {WEIGHTS} nor a readable {INDEX}") from error
    weights: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name:
            raise _unusable(folder, f"{INDEX} names {name}, which lies outside the folder")
        try:
            with safe_open(folder / name, framework="pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- not a dict
        except (OSError, SafetensorError) as error:
            raise _unusable(folder, f"{name} cannot be read ({error})") from error
    return weights


def _unusable(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{folder}: {reason}; name a folder with {CONFIG} and {WEIGHTS}, or download it again")


def write_folder(
    folder: Path,
    *,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer: SavedTokenizer,
    context_length: int,
) -> None:
    """Write weights, configuration and tokenizer to `folder`, which must exist.

    Args:
        folder: destination.
        config: contents of config.json.
        weights: by Hugging Face name.
        tokenizer: the run's tokenizer.
        context_length: tokens per window in training.
    """
    save_file(dict(weights), str(folder / WEIGHTS), metadata={"format": "pt"})
    use_default_mode(folder / WEIGHTS)
    _write_json(folder / CONFIG, config)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ends)
    tokenizer.save(folder)
    _write_tokenizer(folder, bos_id=tokenizer.bos_id, context_length=context_length)


def _write_tokenizer(folder: Path, *, bos_id: int, context_length: int) -> None:
    """Make tokenizer.json begin each text with the bos token, as training does, and write the tokenizer's settings."""
    spec = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    token = next(entry["content"] for entry in spec["added_tokens"] if entry["id"] == bos_id)
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"SpecialToken": {"id": token, "type_id": 1}}, second],
        "special_tokens": {token: {"id": token, "ids": [bos_id], "tokens": [token]}},
    }
    _write_json(folder / TOKENIZER, spec)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token,
        "eos_token": token,
        "pad_token": token,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_folder(finished: Path, folder: Path) -> None:
    """Rename a finished folder to its final name; an empty folder of that name is removed."""
    if folder.exists():
        folder.rmdir()
    finished.rename(folder)


def discard(folder: Path) -> None:
    """Delete a folder that was not finished."""
    shutil.rmtree(folder, ignore_errors=True)
