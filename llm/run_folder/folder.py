"""The folder of one run: its owner, summary, metrics and texts."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm.errors import ConfigError
from llm.run_folder.atomic_files import TEMPORARY, json_value, read_object, replace_json, replace_text
from llm.run_folder.full_disk import REMEDY, refusal_cause
from llm.run_folder.metrics_file import MetricsFile
from llm.run_folder.owner import OwnerFile
from llm.run_folder.ownership import INCOMPLETE, WRITTEN, refuse_occupied

log = logging.getLogger(__name__)

SUMMARY_KEYS = (
    "status",
    "val/loss",
    "bits_per_byte",
    "steps",
    "tokens_seen",
    "seconds",
    "tokens_per_second",
    "mfu",
    "parameters",
    "active_parameters",
    "optimizer_state_bytes",
    "peak_memory_bytes",
    "git_commit",
    "versions",
)
"""Keys that every summary.json has. A value is `null` until it is known. A summary may have further keys."""


class RunFolder:
    """The folder of one run. One process at a time writes to it, and any process may read it at any moment.

    Files are either replaced in one step (summary.json, texts) or grow by whole lines (metrics.jsonl), so a kill never
    leaves a partial file. A full disk does not end the run: it is warned of once, and lines of metrics wait in memory
    until there is space.

    Args:
        path: the folder, which is created when missing.
        is_writer: False on every rank except the first. Methods that write then do nothing.
    """

    def __init__(self, path: str | os.PathLike[str], *, is_writer: bool = True) -> None:
        self.path = Path(path).absolute()
        self.is_writer = is_writer
        self.checkpoints = self.path / "checkpoints"
        self.metrics_path = self.path / "metrics.jsonl"
        self.summary_path = self.path / "summary.json"
        self._owner = OwnerFile(self.path)
        self._metrics = MetricsFile(self.metrics_path)
        self._was_full = False

    def __fspath__(self) -> str:
        return str(self.path)

    def claim(self, *, resume: bool = False) -> None:
        """Make this process the folder's owner. Call this before any expensive work.

        Args:
            resume: whether the folder's own run continues. Without it, a folder that holds a run is refused.

        Raises:
            ConfigError: the folder cannot be written, a live process writes to it, or it holds another run.
        """
        if not self.is_writer:
            return
        if not resume:
            self.check_free()  # before the first write into the folder
        self._probe()
        with self._owner.exclusive():
            owner = self._owner.other_owner()
            if owner is not None:
                raise ConfigError(
                    f"hydra.run.dir={self.path}: process {owner['pid']} on {owner['host']} is writing here; wait for "
                    f"it, choose another folder, or delete {self._owner.path.name} if that machine no longer runs"
                )
            if not resume:
                self.check_free()
            self._owner.take()
        self.remove_leftovers()

    def check_free(self, *others: str) -> None:
        """Refuse the folder for a new run where it has a run, or files that the run or the `others` would replace.

        Raises:
            ConfigError: the folder has such files.
        """
        if trace := self._trace_of_a_run():
            raise ConfigError(
                f"hydra.run.dir={self.path}: already has a run ({trace}); choose another folder, "
                f"or continue that run with resume={self.path}"
            )
        names = [name for name in WRITTEN if name != "run.lock" or self._owner.is_foreign()]
        refuse_occupied(self.path, [*names, *others])

    def release(self) -> None:
        """Remove the lock if this process owns the folder."""
        if self.is_writer:
            self._owner.release()

    def is_live(self) -> bool:
        """Return whether another process is writing to the folder."""
        return self._owner.other_owner() is not None

    def remove_leftovers(self) -> list[str]:
        """Delete incomplete files of a run that was killed, and return their names.

        Only names that a run gives to incomplete files are deleted, because other files belong to the user.
        """
        found = [path for folder in (self.path, self.checkpoints) for path in folder.glob(TEMPORARY + "*")]
        left = [path for path in found if INCOMPLETE.fullmatch(path.name)]
        for path in left:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return [path.name for path in left]

    def read_summary(self) -> dict[str, Any]:
        """Return summary.json, `{}` where it is missing or unreadable."""
        return read_object(self.summary_path) or {}

    def write_summary(self, figures: Mapping[str, Any]) -> None:
        """Replace summary.json in one step. Missing keys of `SUMMARY_KEYS` are written as null."""
        if self.is_writer:
            whole = {key: figures.get(key) for key in SUMMARY_KEYS} | dict(figures)
            with self.unless_full("summary.json"):
                replace_json(self.summary_path, json_value(whole), indent=2)

    def update(self, figures: Mapping[str, Any]) -> None:
        """Set these keys of summary.json in one step, and keep the others."""
        self.write_summary(self.read_summary() | dict(figures))

    def append_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl before returning. A second call for the same step extends its line.

        Args:
            step: optimizer updates done, never less than that of the last line.
            metrics: numbers by full name. A number that is not finite is written as null.
        """
        if not self.is_writer:
            return
        with self.unless_full("metrics.jsonl"):
            self._metrics.append({"step": step} | json_value(dict(metrics)))
        self._owner.refresh()

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl without an incomplete last one."""
        return self._metrics.read()

    def truncate_metrics(self, step: int) -> None:
        """Keep the lines up to and including `step`, because a resumed run writes the later ones again."""
        self._metrics.forget_newest()
        if self.is_writer and self.metrics_path.exists():
            kept = [record for record in self.read_metrics() if record.get("step", 0) <= step]
            replace_text(self.metrics_path, "".join(json.dumps(record) + "\n" for record in kept))

    def save_text(self, name: str, text: str) -> None:
        """Write `text` to the file `name` in one step."""
        if self.is_writer:
            with self.unless_full(name):
                replace_text(self.path / name, text)

    def append_record(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one line of JSON to the file `name`, and create its folder where that is missing."""
        if self.is_writer:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            self.append_text(name, json.dumps(json_value(record)) + "\n")

    def append_text(self, name: str, text: str) -> None:
        """Add `text` to the end of the file `name`."""
        if self.is_writer:
            with self.unless_full(name), open(self.path / name, "a", encoding="utf-8") as file:
                file.write(text)

    @contextlib.contextmanager
    def unless_full(self, name: str) -> Iterator[None]:
        """Warn once instead of raising where a full disk or a file-size limit refuses the file `name`."""
        try:
            yield
        except OSError as error:
            cause = refusal_cause(error)
            if cause is None:
                raise
            if not self._was_full:
                log.warning("%s: %s and this file is incomplete; %s", self.path / name, cause, REMEDY[cause])
            self._was_full = True
        else:
            self._was_full = False

    def _probe(self) -> None:
        """Write and remove a small file, so that missing permission is found now and not hours later."""
        probe = self.path / f"{TEMPORARY}probe-{os.getpid()}"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"hydra.run.dir={self.path}: cannot be written ({error.strerror or error}); "
                "choose a folder with write permission on a disk with free space"
            ) from error

    def _trace_of_a_run(self) -> str:
        """Return what shows that the folder holds a run, "" where nothing does."""
        if self.summary_path.exists():
            return f"status {self.read_summary().get('status', 'unknown')!r}"
        names = [path.name for path in (self.metrics_path, *self.checkpoints.glob("step-*")) if path.exists()]
        return f"it has {names[0]}" if names else ""
