"""Reads any dataset that `datasets` can load, or a weighted mixture of several."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.hub_loading import load_dataset, version_of
from data.readers import text_field
from data.sources import Piece, RawDocument, hash_settings
from llm.errors import ConfigError, DataError, did_you_mean

_MEMBER_KEYS = ("path", "name", "split", "val_split", "field", "revision", "weight")
_PIECES = 64  # of a dataset held on disk; a streamed one has as many as it has files


class HubDataset:
    """Datasets of the Hugging Face hub, by name, or local folders and files that `datasets` reads.

    A folder that `save_to_disk` wrote is read as well. A mixture draws the next document from member i with
    probability `weight_i / sum(weights)` and ends when the first member is used up, so no document is repeated. The
    weights are shares of documents, not of tokens.

    Args:
        path: a name on the hub, or a local folder or file; None where `mixture` is given.
        name: configuration of the dataset, or None.
        split: a split, such as `train` or, unless streaming, `train[:10%]`.
        field: the column that holds the text.
        revision: a branch, tag or commit, or None for the newest.
        streaming: whether to read while downloading, which keeps no copy of the dataset.
        max_documents: number of training documents to read at most, or None for all.
        mixture: None, or mappings with `path` and `weight` (> 0) and, where they differ from the above, `name`,
            `split`, `val_split`, `field`, `revision`.
        seed: seed of the mixture's draws.
        val_split: the split that is the validation set and is read whole, such as `validation`; of a mixture, those of
            all members together. None holds out `loader.val_fraction` of the documents.

    Raises:
        ConfigError: neither or both of `path` and `mixture` are given, a key is unknown, or a weight is not positive.
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
        val_split: str | None = None,
    ):
        if (path is None) == (not mixture):
            raise ConfigError(f"data.path={path}: give either data.path or data.mixture; see docs/data.md")
        if max_documents is not None and max_documents < 1:
            raise ConfigError(f"data.max_documents={max_documents}: must be at least 1; or null for all")
        shared = {"path": path, "name": name, "split": split, "field": field, "revision": revision, "weight": 1.0}
        members = [_checked(shared | {"val_split": val_split}, member) for member in mixture or [{}]]
        self.val_members = [m | {"split": m["val_split"]} for m in members if m["val_split"] is not None]
        self.members = [{key: value for key, value in m.items() if key != "val_split"} for m in members]
        self.streaming = streaming
        self.max_documents = max_documents
        self.seed = seed
        self.is_mixture = True
        self._dataset: Any = None

    @property
    def validation(self) -> "HubDataset | None":
        """See Source."""
        if not self.val_members:
            return None
        own = copy.copy(self)
        own.members = [{key: value for key, value in m.items() if key != "val_split"} for m in self.val_members]
        own.val_members, own.max_documents, own.is_mixture, own._dataset = [], None, False, None
        return own

    def fingerprint(self) -> str:
        """See Source."""
        versions = [version_of(member["path"], member["revision"]) for member in self.members]
        return hash_settings(["hub", self.members, versions, self.streaming, self.max_documents, self.seed])

    def pieces(self) -> list[Piece]:
        """See Source."""
        dataset = self._load()
        if self.streaming:
            if self.max_documents:  # shards differ in length, so only one reader can count to the limit
                return [Piece((), 0, self.max_documents, self.max_documents)]
            return [Piece((), i, None, 1) for i in range(max(dataset.num_shards, 1))]
        rows = min(len(dataset), self.max_documents or len(dataset))
        step = max(-(-rows // _PIECES), 1)
        return [Piece((), start, min(start + step, rows), min(step, rows - start)) for start in range(0, rows, step)]

    def read(self, piece: Piece, counts: Counter[str]) -> Iterator[RawDocument]:
        """See Source."""
        dataset = self._load()
        label = ", ".join(member["path"] for member in self.members)
        if not self.streaming:
            rows = dataset.select(range(piece.start, piece.stop or 0))
        elif self.max_documents:
            rows = dataset.take(self.max_documents)
        else:
            rows = dataset.shard(num_shards=max(dataset.num_shards, 1), index=piece.start)
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
            self._dataset = self._joined([load_dataset(member, streaming=self.streaming) for member in self.members])
        return self._dataset

    def _joined(self, members: list[Any]) -> Any:
        import datasets

        if len(members) == 1:
            return members[0]
        if not self.is_mixture:
            return datasets.concatenate_datasets(members)
        weights = [member["weight"] for member in self.members]
        return datasets.interleave_datasets(
            members,
            probabilities=[weight / sum(weights) for weight in weights],
            seed=self.seed,
            stopping_strategy="first_exhausted",
        )


def _checked(shared: Mapping[str, Any], member: Mapping[str, Any]) -> dict[str, Any]:
    """Return a member of a mixture with the shared settings that it does not replace."""
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
            f"data.mixture: weight={merged['weight']} of {merged['path']}: must be positive; exclude the member instead"
        )
    return merged
