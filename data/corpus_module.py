"""The base of the data module: builds or opens the token cache, and returns its windows."""

from collections.abc import Mapping
from typing import Any

from lightning import LightningDataModule

from data.cache_builder import CacheOptions
from data.corpus_size import refuse_too_few
from data.sources import Source
from data.token_cache import TokenCache, open_or_build
from data.windows import WindowDataset
from llm.errors import DataError


class CorpusModule(LightningDataModule):
    """A corpus as tokens, which `prepare_data` or `setup` builds or opens.

    Args:
        source: the source of documents.
        tokenizer: converts text to ids; it is trained here if necessary.
        context_length: tokens per window.
        options: settings of the token cache.
    """

    def __init__(self, source: Source, tokenizer: Any, *, context_length: int, options: CacheOptions) -> None:
        super().__init__()
        self.source, self.tokenizer, self.context_length, self.options = source, tokenizer, context_length, options
        self._cache: TokenCache | None = None

    def prepare_data(self) -> None:
        """Build the token cache, or open it."""
        self._prepare(trains=True)

    def _prepare(self, *, trains: bool) -> None:
        if self._cache is None:
            self._cache = open_or_build(self.source, self.tokenizer, self.options)
            refuse_too_few(
                self._cache, self.source, self.options, context_length=self.context_length, is_training=trains
            )

    def setup(self, stage: str | None = None) -> None:
        """Open the token cache; the stage `validate` needs no window of the training split."""
        self._prepare(trains=stage != "validate")

    @property
    def cache(self) -> TokenCache:
        """The corpus as tokens."""
        if self._cache is None:
            raise DataError("data: not prepared; call prepare_data() first")
        return self._cache

    @property
    def has_own_validation_set(self) -> bool:
        """Whether the source has a validation set of its own, so that no share of the documents is held out."""
        return self.source.validation is not None

    @property
    def train_tokens(self) -> int:
        """Number of tokens in the training split."""
        return len(self.cache.train)

    @property
    def val_tokens(self) -> int:
        """Number of tokens in the validation split."""
        return len(self.cache.val)

    @property
    def num_windows(self) -> int:
        """Number of windows in the training split, which is one epoch."""
        return len(self.windows("train"))

    @property
    def fingerprint(self) -> str:
        """Name of the corpus as tokens; it differs whenever the ids may differ."""
        return self.cache.fingerprint

    @property
    def report(self) -> Mapping[str, Any]:
        """Counts of the documents that the cleaning kept and discarded."""
        return self.cache.report

    def windows(self, split: str) -> WindowDataset:
        """Return the windows of `train` or `val`."""
        cache = self.cache
        return WindowDataset(
            cache.train if split == "train" else cache.val,
            context_length=self.context_length,
            bos_id=self.tokenizer.bos_id,
            unscored_bit=cache.unscored_bit,
            vocab_size=self.tokenizer.vocab_size,
        )
