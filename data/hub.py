"""Any dataset that `datasets` can load, or a weighted mixture of several."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.readers import text_field
from data.sources import Piece, RawDocument, hash_settings, stat_files
from llm.errors import ConfigError, DataError, did_you_mean

_MEMBER_KEYS = ("path", "name", "split", "field", "revision", "weight")
_PIECES = 64  # of a dataset held on disk; a streamed one has as many as it has files
_logger = logging.getLogger(__name__)


class HubDataset:
    """Reads datasets by name from the hub, or from a local folder or file that `datasets` understands.

    A mixture draws the next document from member i with probability `weight_i / sum(weights)` and ends when the first
    member is used up, so no document is repeated; the weights are shares of documents, not of tokens.

    Args:
        path: Name on the hub, or a local folder; None when `mixture` is given.
        name: Configuration of the dataset, or None.
        split: Split, such as `train` or, unless streaming, `train[:10%]`.
        field: Column that holds the text.
        revision: Branch, tag or commit, or None for the newest.
        streaming: Whether to read while downloading, keeping no copy of the dataset itself.
        max_documents: Documents read at most, or None for all.
        mixture: None, or mappings with `path` and `weight` (> 0) and, where they differ from the above, `name`,
            `split`, `field`, `revision`.
        seed: Of the mixture's draws.

    Raises:
        ConfigError: neither or both of `path` and `mixture`, an unknown key, a weight that is not positive.
        DataError: a dataset cannot be loaded, or lacks the field.
    """

    is_scored = False

    def __init__(
        self,
        *,
        path: str | None,
        name: str | None,
        split: str,
        field: str,
        revision: str | None,
        streaming: bool,
        max_documents: int | None,
        mixture: Sequence[Mapping[str, Any]] | None,
        seed: int,
    ):
        if (path is None) == (not mixture):
            raise ConfigError(f"data.path={path}: give either data.path or data.mixture; see docs/data.md")
        if max_documents is not None and max_documents < 1:
            raise ConfigError(f"data.max_documents={max_documents}: must be at least 1; or null for all")
        shared = {"path": path, "name": name, "split": split, "field": field, "revision": revision, "weight": 1.0}
        self.members = [_checked(shared, member) for member in mixture or [{}]]
        self.streaming = streaming
        self.max_documents = max_documents
        self.seed = seed
        self._dataset: Any = None

    def fingerprint(self) -> str:
        """See Source."""
        versions = [_version(member["path"], member["revision"]) for member in self.members]
        return hash_settings(["hub", self.members, versions, self.streaming, self.max_documents, self.seed])

    def pieces(self) -> list[Piece]:
        """See Source."""
        dataset = self._load()
        if self.streaming:
            count = max(dataset.num_shards, 1)
            share, rest = divmod(self.max_documents or 0, count)
            limits = [share + (i < rest) if self.max_documents else None for i in range(count)]
            return [Piece((), i, limit, limit or 1) for i, limit in enumerate(limits)]
        rows = min(len(dataset), self.max_documents or len(dataset))
        step = max(-(-rows // _PIECES), 1)
        return [Piece((), start, min(start + step, rows), min(step, rows - start)) for start in range(0, rows, step)]

    def read(self, piece: Piece, counts: Counter[str]) -> Iterator[RawDocument]:
        """See Source."""
        dataset = self._load()
        label = ", ".join(member["path"] for member in self.members)
        if self.streaming:
            rows = dataset.shard(num_shards=max(dataset.num_shards, 1), index=piece.start)
            rows = rows if piece.stop is None else rows.take(piece.stop)
        else:
            rows = dataset.select(range(piece.start, piece.stop or 0))
        try:
            for record in rows:
                yield text_field(dict(record), "text", label)
        except ValueError as error:
            raise DataError(f"data.field={self.members[0]['field']}: {error}; name a column of text") from error

    def hint(self) -> str:
        """See Source."""
        return "raise data.max_documents" if self.max_documents else "name a larger dataset or split"

    def _load(self) -> Any:
        if self._dataset is None:
            import datasets

            members = [_load_member(member, streaming=self.streaming) for member in self.members]
            weights = [member["weight"] for member in self.members]
            self._dataset = (
                members[0]
                if len(members) == 1
                else datasets.interleave_datasets(
                    members,
                    probabilities=[weight / sum(weights) for weight in weights],
                    seed=self.seed,
                    stopping_strategy="first_exhausted",
                )
            )
        return self._dataset


def _checked(shared: Mapping[str, Any], member: Mapping[str, Any]) -> dict[str, Any]:
    for key in member:
        if key not in _MEMBER_KEYS:
            keys = ", ".join(_MEMBER_KEYS)
            raise ConfigError(
                f"data.mixture: {key} is no key of a member (they are {keys}){did_you_mean(key, _MEMBER_KEYS)}"
            )
    merged = {**shared, **member}
    if merged["path"] is None:
        raise ConfigError("data.mixture: a member lacks its path; give each one path and weight")
    if not merged["weight"] > 0:
        raise ConfigError(
            f"data.mixture: weight={merged['weight']} of {merged['path']}: must be positive; leave it out"
        )
    return merged


def _load_member(member: Mapping[str, Any], *, streaming: bool) -> Any:
    """Load one dataset and keep its text column alone, under the name `text`."""
    import datasets

    path, field = member["path"], member["field"]
    options = {"name": member["name"], "split": member["split"], "revision": member["revision"]}
    options = {key: value for key, value in options.items() if value is not None}
    try:
        dataset = datasets.load_dataset(path, streaming=streaming, **options)
    except Exception as error:  # hub, network, file and schema errors share no base class
        raise DataError(
            f"data.path={path}: cannot be loaded ({type(error).__name__}: {error}); check path, name and split, "
            "and the network, or give a local folder"
        ) from error
    columns = dataset.column_names
    if columns is None:
        columns = list(next(iter(dataset)))
    if field not in columns:
        raise DataError(f"data.field={field}: not in {path}; its columns are {', '.join(columns)}")
    dataset = dataset.select_columns([field])
    return dataset if field == "text" else dataset.rename_column(field, "text")


def _version(path: str, revision: str | None) -> Any:
    """Return what changes when the dataset does: the files' sizes and times, or the commit on the hub."""
    if os.path.exists(path):
        files = [path] if os.path.isfile(path) else sorted(str(p) for p in Path(path).rglob("*") if p.is_file())
        return stat_files(files)
    import huggingface_hub
    from huggingface_hub import constants

    try:
        return huggingface_hub.HfApi().dataset_info(path, revision=revision, timeout=10).sha
    except Exception as error:  # offline: what was downloaded last is what will be read
        repository = Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}"
        reference = repository / "refs" / (revision or "main")
        if reference.is_file():
            _logger.warning("%s: the hub is out of reach, the copy downloaded last is used", path)
            return reference.read_text().strip()
        if revision is not None and (repository / "snapshots" / revision).is_dir():
            return revision
        raise DataError(
            f"data.path={path}: neither a local path nor found on the hub ({type(error).__name__}: {error}); "
            "check the name and the network"
        ) from error
