"""TokenDataModule: the corpus as micro-batches, the same windows in the same order however the run is laid out."""

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from data.build import CacheOptions, TokenCache, default_cache_dir, open_or_build
from data.loader import WindowLoader
from data.packing import pack
from data.sampler import RunSampler, Span, numbers_at, run_windows, united, validation_windows
from data.sources import Source
from data.tokens import TokenStream
from llm.contracts import IGNORED_LABEL, Batch
from llm.errors import ConfigError, DataError

SCANNED_AT_ONCE = 1 << 22
"""Tokens read at a time where documents are counted."""


class WindowDataset(Dataset):
    """The windows of a token stream: window n is ids n * context_length .. (n + 1) * context_length, both included.

    Raises:
        DataError: an id that the vocabulary does not have, when its window is read.
    """

    def __init__(self, stream: TokenStream, *, context_length: int, bos_id: int, unscored_bit: int, vocab_size: int):
        self.stream, self.vocab_size = stream, vocab_size
        self.context_length = context_length
        self.bos_id = bos_id
        self.unscored_bit = unscored_bit

    def __len__(self) -> int:
        return max(len(self.stream) - 1, 0) // self.context_length

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a whole micro-batch; the loader calls this once for all its windows."""
        windows = np.empty((len(indices), self.context_length + 1), np.int64)
        for row, index in zip(windows, indices, strict=True):
            start = index * self.context_length
            row[:] = self.stream.read(start, start + self.context_length + 1)
        if (windows & ~self.unscored_bit).max(initial=0) >= self.vocab_size:
            self._refuse(windows & ~self.unscored_bit, indices)
        return pack(windows, bos_id=self.bos_id, unscored_bit=self.unscored_bit)

    def _refuse(self, windows: np.ndarray, indices: list[int]) -> None:
        """Raise DataError for the first id outside the vocabulary, and say where it is."""
        row, column = np.argwhere(windows >= self.vocab_size)[0]
        path, offset = self.stream.place(indices[row] * self.context_length + int(column))
        raise DataError(
            f"loader.cache_dir={path}: token {windows[row, column]} at byte {offset}, and the vocabulary has "
            f"{self.vocab_size}: the file is damaged; delete this cache, and it is built again"
        )


class TokenDataModule(LightningDataModule):
    """Builds or opens the token cache, and serves the micro-batches of a run.

    `prepare_data` and `setup` may be called before the Trainer exists; then `tokenizer`, `train_tokens`, `val_tokens`,
    `num_windows`, `fingerprint` and `report` are known. The training loader holds every micro-batch of the run and
    begins at the trainer's current step, so a resumed run continues with exactly the windows that come next.

    Args:
        source: Where documents come from.
        tokenizer: Text to ids; trained here if it needs to be.
        context_length: Tokens a window.
        batch_tokens: Tokens an optimizer step, over all devices.
        micro_batch_size: Windows a device a forward; may be set later, before training.
        seed: Selects the order of the windows.
        val_fraction: Share of the documents held out for validation, in (0, 1).
        val_tokens: Tokens of the validation split that one validation reads, at most.
        num_workers: Processes that load; 0 loads in the training process, which costs microseconds a window.
        cache_dir: Where tokens live; None for `$CRUCIBLE_CACHE` or the user's cache folder.
        deduplicate: Whether to keep only the first of documents that are the same byte for byte.
        max_line_bytes: Documents with a longer line are left out, and counted; None keeps all.
        num_processes: Processes that tokenise; None for one a core.
        ramp: Where the steps of a run differ in size: has `batch_tokens_at(step)` and `tokens_seen(step)`.

    Raises:
        ConfigError: a value out of its range.
        DataError: nothing to read, a broken file, fewer tokens than one window, an empty validation split.
    """

    def __init__(
        self,
        *,
        source: Source,
        tokenizer: Any,
        context_length: int,
        batch_tokens: int,
        micro_batch_size: int,
        seed: int,
        val_fraction: float,
        val_tokens: int,
        num_workers: int,
        cache_dir: str | Path | None,
        deduplicate: bool,
        max_line_bytes: int | None,
        num_processes: int | None,
        ramp: Any = None,
    ):
        super().__init__()
        _check_range("loader.val_fraction", val_fraction, 0 < val_fraction < 1, "above 0 and below 1", "0.02")
        _check_range("context_length", context_length, context_length >= 1, "at least 1", "256")
        _check_range("loader.val_tokens", val_tokens, val_tokens >= context_length, "at least context_length", "65536")
        _check_range("loader.num_workers", num_workers, num_workers >= 0, "at least 0", "0")
        for key, value in (("max_line_bytes", max_line_bytes), ("num_processes", num_processes)):
            _check_range(f"loader.{key}", value, value is None or value >= 1, "at least 1", "null")
        self.source = source
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.batch_tokens = batch_tokens
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.max_val_tokens = val_tokens
        self.num_workers, self.ramp = num_workers, ramp
        folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self.options = CacheOptions(folder, val_fraction, deduplicate, max_line_bytes, num_processes)
        self._cache: TokenCache | None = None
        self._loaders: list[WindowLoader] = []
        self.left_out: list[Span] = []

    def prepare_data(self) -> None:
        """Build the token cache, or find it."""
        self._prepare(trains=True)

    def _prepare(self, *, trains: bool) -> None:
        if self._cache is None:
            self._cache = open_or_build(self.source, self.tokenizer, self.options)
            self._refuse_too_few(trains=trains)

    def setup(self, stage: str | None = None) -> None:
        """Open the token cache; a stage of `validate` needs no window of the training split."""
        self._prepare(trains=stage != "validate")

    @property
    def cache(self) -> TokenCache:
        """The corpus as tokens."""
        if self._cache is None:
            raise DataError("data: not prepared; call prepare_data() first")
        return self._cache

    @property
    def train_tokens(self) -> int:
        """Tokens of the training split."""
        return len(self.cache.train)

    @property
    def val_tokens(self) -> int:
        """Tokens of the validation split."""
        return len(self.cache.val)

    @property
    def num_windows(self) -> int:
        """Windows of the training split: an epoch."""
        return len(self.windows("train"))

    @property
    def fingerprint(self) -> str:
        """Name of the corpus as tokens: it differs whenever the ids may differ."""
        return self.cache.fingerprint

    @property
    def report(self) -> dict[str, Any]:
        """What the cleaning kept and left out."""
        return self.cache.report

    @property
    def windows_per_step(self) -> int:
        """Windows an optimizer step, over all devices."""
        if self.batch_tokens % self.context_length:
            nearest = max(round(self.batch_tokens / self.context_length), 1) * self.context_length
            raise ConfigError(
                f"batch_tokens={self.batch_tokens}: must be a multiple of context_length={self.context_length}; "
                f"try {nearest}"
            )
        return self.batch_tokens // self.context_length

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

    def train_sampler(
        self, *, total_steps: int, rank: int = 0, world_size: int = 1, start_step: Callable[[], int] = lambda: 0
    ) -> RunSampler:
        """Return the order of a run; usable without a Trainer."""
        return RunSampler(
            num_windows=self.num_windows,
            seed=self.seed,
            windows_per_step=self.windows_per_step,
            micro_batch_size=self.micro_batch_size,
            rank=rank,
            world_size=world_size,
            total_steps=total_steps,
            start_step=start_step,
            span_of_step=self._span_of_step,
            left_out=self.left_out,
        )

    def windows_of_step(self, step: int) -> list[int]:
        """Return the windows of the update that follows `step` updates, in the order of the sampler."""
        start, count = self._span_of_step(step)
        order = {"num_windows": self.num_windows, "seed": self.seed, "left_out": self.left_out}
        return run_windows(start, start + count, **order).tolist()

    def labels_of_step(self, step: int) -> int | None:
        """Return the number of labels with a loss in an update, over all devices; None where every label has one.

        Each rank reads the windows of the whole update, so that no rank waits for another.
        """
        if not self.cache.unscored_bit:
            return None
        return int((self.windows("train").__getitems__(self.windows_of_step(step))["labels"] != IGNORED_LABEL).sum())

    def numbers_of_steps(self, first: int, last: int) -> Span:
        """Return the span of the run's numbers from the first window of one update to the last of another."""
        start, count = self._span_of_step(last)
        ends = numbers_at(np.array([self._span_of_step(first)[0], start + count - 1]), self.left_out)
        return int(ends[0]), int(ends[1]) + 1

    def leave_out(self, spans: Iterable[Sequence[int]]) -> None:
        """Pass over these numbers of the run as well, from the next loader on."""
        self.left_out = united([*self.left_out, *((int(start), int(stop)) for start, stop in spans)])

    def state_dict(self) -> dict[str, Any]:
        """Return which numbers of the run are left out; nothing where none are."""
        return {"left_out": [list(span) for span in self.left_out]} if self.left_out else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Leave out what the run that goes on had left out."""
        self.leave_out(state_dict["left_out"])

    def documents_in(self, windows: list[int]) -> list[tuple[int, int]]:
        """Return the numbers of the first and the last training document in each window, counted from 0.

        Reads the corpus up to the last of them: seconds for billions of tokens.
        """
        stream, cache, length = self.cache.train, self.cache, self.context_length
        ends = sorted({edge for window in windows for edge in (window * length + 1, (window + 1) * length)})
        begun, at, count = {0: 0}, 0, 0
        for end in ends:
            while at < end:
                part = stream.read(at, min(end, at + SCANNED_AT_ONCE))
                ids = part & ~part.dtype.type(cache.unscored_bit) if cache.unscored_bit else part
                count, at = count + int((ids == self.tokenizer.bos_id).sum()), at + len(part)
            begun[end] = count
        spans = [(begun[w * length + 1], begun[(w + 1) * length]) for w in windows]
        return [(max(first - 1, 0), max(last - 1, 0)) for first, last in spans]

    def _span_of_step(self, step: int) -> tuple[int, int]:
        """Return the place of an update's first window, and how many it has."""
        if self.ramp is None:
            return step * self.windows_per_step, self.windows_per_step
        tokens = self.ramp.tokens_seen(step), self.ramp.batch_tokens_at(step)
        return tokens[0] // self.context_length, tokens[1] // self.context_length

    def train_dataloader(self) -> DataLoader:
        """Return all micro-batches of the run; iteration begins at the trainer's step."""
        trainer = self._trainer()
        if trainer.max_steps < 1:
            raise ConfigError(f"max_steps={trainer.max_steps}: the order of windows needs a number of steps; give one")
        sampler = self.train_sampler(
            total_steps=trainer.max_steps,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start_step=lambda: trainer.global_step,
        )
        if sampler.accumulation != trainer.accumulate_grad_batches:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: batch_tokens={self.batch_tokens} "
                f"needs {sampler.accumulation} micro-batches a step; change batch_tokens instead"
            )
        return self._loader("train", sampler)

    def val_dataloader(self) -> DataLoader:
        """Return this rank's validation windows: the same in every validation of every run on this corpus."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        windows = validation_windows(
            num_windows=len(self.windows("val")),
            limit=self.max_val_tokens // self.context_length,
            rank=rank,
            world_size=world_size,
        )
        if not len(windows):
            raise DataError(
                f"loader.val_fraction={self.options.val_fraction}: fewer validation windows than {world_size} devices; "
                "raise it"
            )
        size = self.micro_batch_size
        return self._loader("val", [windows[i : i + size].tolist() for i in range(0, len(windows), size)])

    def validation_batches(self) -> Iterator[Batch]:
        """Yield all that one validation reads, on whatever rank this is."""
        dataset = self.windows("val")
        limit = self.max_val_tokens // self.context_length
        windows = validation_windows(num_windows=len(dataset), limit=limit, rank=0, world_size=1)
        for start in range(0, len(windows), self.micro_batch_size):
            yield dataset.__getitems__(windows[start : start + self.micro_batch_size].tolist())

    def _loader(self, split: str, batches: Any) -> DataLoader:
        loader = WindowLoader(
            self.windows(split),
            batch_sampler=batches,
            collate_fn=_keep,
            num_workers=self.num_workers,
            worker_init_fn=_ignore_signals,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0 and split == "val",
        )
        self._loaders.append(loader)
        return loader

    def killed_workers(self) -> list[str]:
        """Return the names of the signals that ended workers of this module's loaders."""
        return [name for loader in self._loaders for name in loader.killed_workers()]

    def _trainer(self) -> Any:
        if self.trainer is None:
            raise ConfigError("trainer: the data module has none; use train_sampler() outside a Trainer")
        return self.trainer

    def _refuse_too_few(self, *, trains: bool) -> None:
        """Raise DataError when a split that is read holds no window."""
        needed, hint = self.context_length + 1, self.source.hint()
        dropped = ", ".join(
            f"{self.report[key]} {key}" for key in ("empty", "invalid_utf8", "long_lines", "duplicates")
        )
        found = f"{self.report['documents']} documents; left out: {dropped}"
        if trains and self.train_tokens < needed:
            raise DataError(
                f"context_length={self.context_length}: one window needs {needed} tokens, the training split has "
                f"{self.train_tokens} ({found}); {hint}, or lower context_length"
            )
        if self.val_tokens < needed:
            raise DataError(
                f"loader.val_fraction={self.options.val_fraction}: the validation split has {self.val_tokens} tokens, "
                f"one window needs {needed} ({found}); raise loader.val_fraction, or {hint}"
            )


def _check_range(key: str, value: object, is_legal: bool, rule: str, suggestion: str) -> None:
    if not is_legal:
        raise ConfigError(f"{key}={value}: must be {rule}; try {suggestion}")


def _keep(batch: Any) -> Batch:
    return batch


def _ignore_signals(_: int) -> None:
    """Let the main process alone answer what stops a run: it saves a checkpoint first and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
