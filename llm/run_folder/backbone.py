"""The weights that an adapted run keeps frozen: found by name and hash, and not saved again."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.errors import CheckpointError
from llm.run_folder.checkpoint_files import MODEL

BACKBONE = "backbone"
"""Entry of a manifest with the folder and hash of the frozen weights."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Frozen weights of a run.

    Args:
        folder: a checkpoint folder or a Hugging Face folder.
        sha256: hash of its weight files.
    """

    folder: str
    sha256: str


def backbone_of(folder: Path) -> Backbone:
    """Return the name and hash of the weights in a checkpoint folder or a Hugging Face folder."""
    return Backbone(folder=str(folder.resolve()), sha256=weights_hash(folder))


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of the safetensors files of a folder, in the order of their names."""
    digest = hashlib.sha256()
    files = [folder / MODEL] if (folder / "manifest.json").is_file() else sorted(folder.glob("*.safetensors"))
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def find_backbone(manifest: Mapping[str, Any], others: Iterable[Path]) -> Path:
    """Return the folder of the frozen weights that a checkpoint names, whose hash is the recorded one.

    Args:
        manifest: of the checkpoint.
        others: further folders to look in, such as those of `init_from`, where the recorded one has moved.

    Raises:
        CheckpointError: no folder has these weights.
    """
    recorded = Backbone(**manifest[BACKBONE])
    for folder in [Path(recorded.folder), *others]:
        if folder.is_dir() and weights_hash(folder) == recorded.sha256:
            return folder
    raise CheckpointError(
        f"{BACKBONE}={recorded.folder}: the frozen weights are missing or have changed (sha256 "
        f"{recorded.sha256[:12]}…); put the folder back, or set init_from in the run's config.yaml to its place"
    )
