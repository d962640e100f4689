"""Text beside a run's own corpus, read with the run's tokenizer and held out as the run holds out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llm.config.build import build_data
from llm.config.checked import CheckedConfig
from llm.config.conf import conf_folder
from llm.config.pieces import instantiate

TEXT = conf_folder() / "data" / "text.yaml"
TOKENIZER = "tokenizer.json"


def open_source(checked: CheckedConfig, folder: Path, files: str, share: float | None) -> Any:
    """Return a data module, set up, whose held-out part is a share of some files.

    A document is held out by its content alone, so what is held out of a part of the run's corpus was held out of the
    whole as well.

    Args:
        checked: the run's configuration.
        folder: the run folder, which holds the tokenizer.
        files: a path or glob.
        share: of the documents to read, or None for the run's own share.
    """
    cfg = dict(checked.tree)
    cfg["data"] = {**_text_node(cfg["data"]), "files": files}
    if (folder / TOKENIZER).is_file() and not cfg["tokenizer"]["_target_"].endswith("ByteTokenizer"):
        bos_token = cfg["tokenizer"].get("bos_token")
        target = "data.tokenizer.PretrainedTokenizer"
        cfg["tokenizer"] = {"_target_": target, "path": str(folder / TOKENIZER), "bos_token": bos_token}
    if share is not None:
        cfg["loader"] = {**cfg["loader"], "val_fraction": share}
    data = build_data(cfg, checked.sizes)
    data.prepare_data()
    data.setup("validate")
    return data


def _text_node(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings by which files are read: the run's own where it reads files."""
    if "files" not in node:
        return yaml.safe_load(TEXT.read_text(encoding="utf-8"))
    # documents are cut as in the whole corpus, or others would be held out
    return {**node, "document_bytes": instantiate(node).pieces()[0].unit}


def source_patterns(cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the patterns of the run's corpus where there are several."""
    files = cfg["data"].get("files")
    return tuple(files) if isinstance(files, list) and len(files) > 1 else ()
