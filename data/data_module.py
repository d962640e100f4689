"""Serves a corpus as micro-batches, in an order that does not depend on devices, workers or micro-batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from data.cache_builder import CacheOptions
from data.corpus_module import CorpusModule
from data.loader import WindowLoader
from data.sampler import RunSampler, Span, numbers_at, run_windows, united, validation_windows
from data.sources import Source
from data.step_spans import StepSpans, TokenRamp
from data.token_cache import default_cache_dir
from llm.contracts import IGNORED_LABEL, Batch
from llm.errors import ConfigError, DataError


class TokenDataModule(CorpusModule):
    """A data module that builds or opens the token cache and serves the micro-batches of a run.

    `prepare_data` and `setup` may be called before a Trainer exists. From then on `tokenizer`, `train_tokens`,
    `val_tokens`, `num_windows`, `fingerprint` and `report` are known. The training loader has every micro-batch of the
    run and begins at the trainer's current step, so a resumed run reads exactly the windows that come next.

    Args:
        source: the source of documents.
        tokenizer: converts text to ids; it is trained here if necessary.
        context_length: tokens per window.
        batch_tokens: tokens per update, over all devices.
        micro_batch_size: windows per device and forward; it may be set later, before training.
        seed: seed of the order of the windows.
        val_fraction: share of the documents that are held out for validation, in (0, 1). It has no effect where the
            source has a validation set of its own.
        val_tokens: tokens of the validation split that one validation reads, at most.
        num_workers: processes that load windows; 0 loads in the training process, which takes microseconds per window.
        cache_dir: the folder of token caches; None for `$CRUCIBLE_CACHE` or the user's cache folder.
        deduplicate: whether to keep only the first of documents with identical bytes.
        max_line_bytes: documents with a longer line are discarded and counted; None keeps all.
        num_processes: processes that tokenise; None for one per core.
        ramp: has `batch_tokens_at(step)` and `tokens_seen(step)` where updates differ in size; otherwise None.

    Raises:
        ConfigError: a value is out of its range.
        DataError: there is nothing to read, a file is broken, there are fewer tokens than one window, or the validation
            split is empty.
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
        ramp: TokenRamp | None = None,
    ):
        _check_range("loader.val_fraction", val_fraction, 0 < val_fraction < 1, "above 0 and below 1", "0.02")
        _check_range("context_length", context_length, context_length >= 1, "at least 1", "256")
        _check_range("loader.val_tokens", val_tokens, val_tokens >= context_length, "at least context_length", "65536")
        _check_range("loader.num_workers", num_workers, num_workers >= 0, "at least 0", "0")
        for key, value in (("max_line_bytes", max_line_bytes), ("num_processes", num_processes)):
            _check_range(f"loader.{key}", value, value is None or value >= 1, "at least 1", "null")
        folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        options = CacheOptions(folder, val_fraction, deduplicate, max_line_bytes, num_processes)
        super().__init__(source, tokenizer, context_length=context_length, options=options)
        self.batch_tokens = batch_tokens
        self.micro_batch_size, self.seed = micro_batch_size, seed
        self.max_val_tokens = val_tokens
        self.num_workers, self.ramp = num_workers, ramp
        self._loaders: list[WindowLoader] = []
        self.left_out: list[Span] = []

    @property
    def windows_per_step(self) -> int:
        """Windows per update, over all devices."""
        return self._spans.windows_per_step

    @property
    def _spans(self) -> StepSpans:
        return StepSpans(self.batch_tokens, self.context_length, self.ramp)

    def train_sampler(
        self, *, total_steps: int, rank: int = 0, world_size: int = 1, start_step: Callable[[], int] = lambda: 0
    ) -> RunSampler:
        """Return the order of a run; it needs no Trainer."""
        return RunSampler(
            num_windows=self.num_windows,
            seed=self.seed,
            windows_per_step=self.windows_per_step,
            micro_batch_size=self.micro_batch_size,
            rank=rank,
            world_size=world_size,
            total_steps=total_steps,
            start_step=start_step,
            span_of_step=self._spans.span,
            left_out=self.left_out,
        )

    def windows_of_step(self, step: int) -> list[int]:
        """Return the windows of the update that follows `step` updates, in the order of the sampler."""
        start, count = self._spans.span(step)
        return run_windows(
            start, start + count, num_windows=self.num_windows, seed=self.seed, left_out=self.left_out
        ).tolist()

    def labels_of_step(self, step: int, *, with_last: bool = True) -> int | None:
        """Return the number of labels with a loss in an update, over all devices; None where every label has one.

        Without `with_last` the last label of each window is not counted. Each rank reads the windows of the whole
        update, so that no rank waits for another.
        """
        if not self.cache.unscored_bit:
            return None
        labels = self.windows("train").__getitems__(self.windows_of_step(step))["labels"]
        return int((labels[:, : None if with_last else -1] != IGNORED_LABEL).sum())

    def numbers_of_steps(self, first: int, last: int) -> Span:
        """Return the span of the run's window numbers from the first window of one update to the last of another."""
        start, count = self._spans.span(last)
        ends = numbers_at(np.array([self._spans.span(first)[0], start + count - 1]), self.left_out)
        return int(ends[0]), int(ends[1]) + 1

    def leave_out(self, spans: Iterable[Sequence[int]]) -> None:
        """Exclude these window numbers of the run too, from the next loader on."""
        self.left_out = united([*self.left_out, *((int(start), int(stop)) for start, stop in spans)])

    def state_dict(self) -> dict[str, Any]:
        """Return the excluded window numbers of the run; an empty mapping where there are none."""
        return {"left_out": [list(span) for span in self.left_out]} if self.left_out else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Exclude the window numbers that the resumed run had excluded."""
        self.leave_out(state_dict["left_out"])

    def documents_in(self, windows: list[int]) -> list[tuple[int, int]]:
        """Return the numbers of the first and the last training document in each window, counted from 0."""
        return self.windows("train").documents_in(windows)

    def train_dataloader(self) -> DataLoader:
        """Return all micro-batches of the run; iteration begins at the trainer's step."""
        trainer = self.trainer
        if trainer is None:
            raise ConfigError("trainer: the data module has none; use train_sampler() outside a Trainer")
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
                f"needs {sampler.accumulation} micro-batches per update; change batch_tokens instead"
            )
        return self._loader("train", sampler)

    def val_dataloader(self) -> DataLoader:
        """Return this rank's validation windows, which are the same in every validation of every run on this corpus."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        batches = self._validation_batches(rank, world_size)
        if not batches:
            raise DataError(
                f"loader.val_fraction={self.options.val_fraction}: fewer validation windows than {world_size} devices; "
                "raise it, or give a larger validation set"
            )
        return self._loader("val", batches)

    def validation_batches(self) -> Iterator[Batch]:
        """Yield all that one validation reads, on any rank."""
        dataset = self.windows("val")
        for batch in self._validation_batches(rank=0, world_size=1):
            yield dataset.__getitems__(batch)

    def _validation_batches(self, rank: int, world_size: int) -> list[list[int]]:
        windows = validation_windows(
            num_windows=len(self.windows("val")),
            limit=self.max_val_tokens // self.context_length,
            rank=rank,
            world_size=world_size,
        ).tolist()
        return [windows[i : i + self.micro_batch_size] for i in range(0, len(windows), self.micro_batch_size)]

    def _loader(self, split: str, batches: RunSampler | list[list[int]]) -> DataLoader:
        loader = WindowLoader(
            self.windows(split),
            batch_sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0 and split == "val",
        )
        self._loaders.append(loader)
        return loader

    def killed_workers(self) -> list[str]:
        """Return the names of the signals that ended workers of this module's loaders."""
        return [name for loader in self._loaders for name in loader.killed_workers()]


def _check_range(key: str, value: object, is_valid: bool, rule: str, suggestion: str) -> None:
    if not is_valid:
        raise ConfigError(f"{key}={value}: must be {rule}; try {suggestion}")
