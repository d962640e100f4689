"""Loads one dataset of the hub or of the local disk, and names its version."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.compressed import compression_of
from data.readers import LINES, TABLES, csv_options, format_of
from data.sources import stat_files
from llm.errors import DataError

_SAVED_DATASET, _SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files by which a folder of `save_to_disk` is recognised: one dataset, or one per split."""
_logger = logging.getLogger(__name__)


def load_dataset(member: Mapping[str, Any], *, streaming: bool) -> Any:
    """Load one dataset and keep its text column alone, under the name `text`.

    Raises:
        DataError: it cannot be loaded, or lacks the column.
    """
    path, field = member["path"], member["field"]
    refuse_missing_path(path)
    try:
        dataset = _load_saved(member, streaming) if is_saved(path) else _load(member, streaming)
        columns = dataset.column_names
    except DataError:
        raise
    except Exception as error:  # hub, network, file and schema errors share no base class
        raise DataError(
            f"data.path={path}: cannot be loaded ({type(error).__name__}: {error}); check path, name and split, "
            "and the network, or give a local folder"
        ) from error
    if columns is None:
        columns = list(next(iter(dataset)))
    if field not in columns:
        raise DataError(f"data.field={field}: not in {path}; its columns are {', '.join(columns)}")
    dataset = dataset.select_columns([field])
    return dataset if field == "text" else dataset.rename_column(field, "text")


def _load(member: Mapping[str, Any], streaming: bool) -> Any:
    import datasets
    from datasets.packaged_modules.csv.csv import CsvConfig

    location = member["path"]
    options: dict[str, Any] = {key: member[key] for key in ("name", "revision") if member[key] is not None}
    if os.path.isfile(location):
        location, options = builder_for(location), {"data_files": [os.path.abspath(location)]}
    if isinstance(datasets.load_dataset_builder(location, **options).config, CsvConfig):
        options |= csv_options(member["field"])
    return datasets.load_dataset(location, split=member["split"], streaming=streaming, **options)


def builder_for(path: str) -> str:
    """Return the builder of `datasets` that reads one local file.

    Raises:
        DataError: the file is plain text, which data=text reads.
    """
    kind = format_of(path)
    if kind not in TABLES and kind not in LINES:
        raise DataError(f"data.path={path}: a file without records; read it with data=text data.files={path}")
    return "json" if kind in LINES else TABLES[kind]


def is_saved(path: str) -> bool:
    """Return whether a path is a folder that `save_to_disk` wrote."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (_SAVED_DATASET, _SAVED_SPLITS))


def _load_saved(member: Mapping[str, Any], streaming: bool) -> Any:
    """Load the split of a folder that `save_to_disk` wrote. A folder with one dataset has only that split."""
    import datasets

    path, name = member["path"], member["split"].split("[")[0]
    found = datasets.load_from_disk(path)
    if isinstance(found, datasets.DatasetDict):
        if name not in found:
            raise DataError(f"data.split={name}: not in {path}; its splits are {', '.join(map(str, found))}")
        dataset = found[name]
    else:
        dataset = found
        own = str(dataset.split) if dataset.split is not None else "train"
        if own != name:
            raise DataError(f"data.split={name}: {path} holds one dataset, of the split {own}; set data.split={own}")
    for part in datasets.ReadInstruction.from_spec(member["split"]).to_absolute({name: len(dataset)}):
        dataset = dataset.select(range(part.from_ or 0, len(dataset) if part.to is None else part.to))
    return dataset.to_iterable_dataset() if streaming else dataset


def refuse_missing_path(path: str) -> None:
    """Raise DataError for a path that can only be local and does not exist; the hub would be asked for minutes."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or format_of(path) != ".txt"
    if (looks_local or compression_of(path)) and not os.path.exists(path):
        raise DataError(f"data.path={path}: no such file or folder; check the path (relative to {os.getcwd()})")


def version_of(path: str, revision: str | None) -> Any:
    """Return a value that changes with the dataset: the files' sizes and times, or the commit on the hub."""
    refuse_missing_path(path)
    if os.path.exists(path):
        files = [path] if os.path.isfile(path) else sorted(str(p) for p in Path(path).rglob("*") if p.is_file())
        return stat_files(files)
    import huggingface_hub
    from huggingface_hub import constants

    try:
        return huggingface_hub.HfApi().dataset_info(path, revision=revision, timeout=10).sha
    except Exception as error:  # without a network, the copy that was downloaded last is read
        repository = Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}"
        reference = repository / "refs" / (revision or "main")
        if reference.is_file():
            _logger.warning("%s: the hub cannot be reached; the copy that was downloaded last is used", path)
            return reference.read_text().strip()
        if revision is not None and (repository / "snapshots" / revision).is_dir():
            return revision
        raise DataError(
            f"data.path={path}: neither a local path nor found on the hub ({type(error).__name__}: {error}); "
            "check the name and the network"
        ) from error
