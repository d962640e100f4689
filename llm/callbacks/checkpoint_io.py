"""Lets Lightning save and load checkpoints as folders."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from llm.errors import CheckpointError
from llm.run_folder.background import BackgroundWriter
from llm.run_folder.checkpoint import (
    Contents,
    contents_of,
    load_model,
    load_training,
    names_not_finite,
    write_contents,
)
from llm.run_folder.checkpoint_files import remove_checkpoint


class FolderCheckpointIO(CheckpointIO):
    """A plugin for `Trainer(plugins=[...])` that saves and loads checkpoints as folders.

    Saving stops training only while the state is copied in memory. A thread writes the copy. There is one copy at a
    time, so training waits where a checkpoint is due before the last one is written.

    Args:
        manifest: what each manifest.json records about the run: world_size, versions, config_hash.

    Attributes:
        writer: a queue of tasks that run after the checkpoint is written. It raises the errors of failed tasks.
    """

    def __init__(self, *, manifest: Mapping[str, Any]) -> None:
        self.manifest = dict(manifest)
        self.writer = BackgroundWriter()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Copy Lightning's dictionary; a thread writes it as a checkpoint folder at `path`."""
        if storage_options is not None:
            raise CheckpointError(
                f"storage_options={storage_options}: a checkpoint folder has no such options; remove storage_options"
            )
        state = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
        training = {name: value for name, value in checkpoint.items() if name != "state_dict"}
        training["state_dict_extra"] = {n: v for n, v in checkpoint["state_dict"].items() if n not in state}
        self.writer.wait()
        contents = contents_of(state, training, is_copy=True)
        manifest = self.manifest | {"step": checkpoint["global_step"]}
        self.writer.submit(partial(_write_finite, Path(path), contents, manifest=manifest))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return Lightning's dictionary on the CPU, always as plain data regardless of `weights_only`."""
        self.writer.wait()
        folder = Path(path)
        training = load_training(folder)
        extra = training.pop("state_dict_extra", {})
        return training | {"state_dict": load_model(folder, check=False) | extra}

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the checkpoint folder at `path`."""
        self.writer.wait()
        remove_checkpoint(Path(path))

    def teardown(self) -> None:
        """Wait until every checkpoint is written."""
        self.writer.wait()


def _write_finite(folder: Path, contents: Contents, *, manifest: Mapping[str, Any]) -> None:
    """Write a checkpoint if its weights are finite. Otherwise it would replace one that can be resumed."""
    if bad := names_not_finite(contents.tensors):
        raise CheckpointError(
            f"checkpoint={folder}: {bad} has values that are not finite, so it was not saved; continue from "
            "the previous one with a lower optimizer.lr, in a new run with init_from=<run folder>"
        )
    write_contents(folder, contents, manifest=manifest)
