"""Opens text other than a run's own corpus, with the run's tokenizer."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llm.config.build import build_data
from llm.config.checked import CheckedConfig
from llm.config.conf import conf_folder
from llm.config.pieces import instantiate, piece_at

TOKENIZER = "tokenizer.json"
WHOLE = {"val_fraction": math.nextafter(1.0, 0.0), "val_tokens": 1 << 40}
"""Settings of the loader that hold out all documents of a text and do not limit its tokens."""

log = logging.getLogger(__name__)


def open_source(checked: CheckedConfig, folder: Path, files: str, share: float | None) -> Any:
    """Return a data module whose validation split is a share of some files.

    Where the run held out a share of its own files, the content of a document alone decided. A document that is held
    out of a part of the corpus was therefore held out of the whole corpus too.

    Args:
        checked: the run's configuration.
        folder: the run folder, which has the tokenizer.
        files: a path or glob.
        share: share of the documents to read. None reads a text whole, but a pattern of the run's own data.files only
            as far as the run held it out.
    """
    cfg = dict(checked.tree)
    if share is None and not _holds_out(cfg["data"], files):
        share = 1.0
    cfg["data"] = {**_text_node(cfg["data"]), "files": files}
    if (folder / TOKENIZER).is_file() and not piece_at(cfg["tokenizer"]["_target_"]).has_one_token_a_byte:
        bos_token = cfg["tokenizer"].get("bos_token")
        target = "data.tokenizer.PretrainedTokenizer"
        cfg["tokenizer"] = {"_target_": target, "path": str(folder / TOKENIZER), "bos_token": bos_token}
    if share is not None:
        cfg["loader"] = {**cfg["loader"], **(WHOLE if share == 1 else {"val_fraction": share})}
    data = build_data(cfg, checked.sizes)
    data.setup("validate")
    return data


def _holds_out(node: Mapping[str, Any], files: str) -> bool:
    """Return whether the run held out a share of these files; warn where it trained on all of them."""
    if files not in _patterns(node, "files"):
        return False
    if not _patterns(node, "val_files"):
        return True
    log.warning("%s: the run was trained on this text, since data.val_files is its validation set", files)
    return False


def _text_node(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings for reading files: the run's own where it reads files, and the defaults otherwise."""
    if "files" not in node:
        return yaml.safe_load((conf_folder() / "data" / "text.yaml").read_text(encoding="utf-8"))
    # documents must be cut as in the whole corpus, or other documents would be held out
    return {**node, "val_files": None, "document_bytes": instantiate(node).pieces()[0].unit}


def source_patterns(cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the patterns of the run's held-out text, or none where it has only one."""
    patterns = _patterns(cfg["data"], "val_files") or _patterns(cfg["data"], "files")
    return patterns if len(patterns) > 1 else ()


def _patterns(node: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = node.get(key)
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)
