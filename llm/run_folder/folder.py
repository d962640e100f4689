"""The folder that one run leaves behind: who owns it, its summary, its metrics, and what made it."""

import contextlib
import fcntl
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from llm.errors import ConfigError
from llm.run_folder.checkpoint_files import is_full_disk
from llm.run_folder.metrics import MetricsFile, parse_object

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
"""What every summary.json holds, `null` until it is known; other figures may stand beside them."""

ABANDONED_AFTER = 900.0
"""Seconds without a sign of life after which a run on another host counts as dead (its process cannot be asked)."""

_TEMPORARY = ".tmp-"


class RunFolder:
    """One run's folder: claimed by one process at a time, readable at any moment, whole after any kill.

    Every file is either replaced in one step (summary.json, texts) or grows by whole lines (metrics.jsonl). None of
    them ends a run: a full disk is warned of once, and lines of metrics wait in memory until there is room.

    Args:
        path: the folder; made when missing.
        is_writer: False on every rank but the first: then all that would write does nothing.
    """

    def __init__(self, path: str | os.PathLike[str], *, is_writer: bool = True) -> None:
        self.path = Path(path).absolute()
        self.is_writer = is_writer
        self.checkpoints = self.path / "checkpoints"
        self.metrics_path = self.path / "metrics.jsonl"
        self.summary_path = self.path / "summary.json"
        self._lock_path = self.path / "run.lock"
        self._metrics = MetricsFile(self.metrics_path)
        self._last_sign = 0.0
        self._was_full = False

    def __fspath__(self) -> str:
        return str(self.path)

    def claim(self, *, resume: bool = False) -> None:
        """Take the folder for this process, or say why not, before anything expensive is done.

        Args:
            resume: the folder's own run goes on; without it a folder that already holds a run is refused.

        Raises:
            ConfigError: it cannot be written, a live run uses it, or it holds another run.
        """
        if not self.is_writer:
            return
        self._probe()
        with self._exclusive():
            owner = self._live_owner()
            if owner is not None:
                raise ConfigError(
                    f"hydra.run.dir={self.path}: process {owner['pid']} on {owner['host']} is writing here; wait for "
                    f"it, choose another folder, or delete {self._lock_path.name} if that machine is gone"
                )
            if not resume and (trace := self._trace_of_a_run()):
                raise ConfigError(
                    f"hydra.run.dir={self.path}: already holds a run ({trace}); choose another folder, "
                    f"or continue that run with resume={self.path}"
                )
            replace_text(self._lock_path, json.dumps(_this_process()))
        self.remove_leftovers()

    def release(self) -> None:
        """Give the folder up; without effect when this process does not own it."""
        if self.is_writer and _read_object(self._lock_path) == _this_process():
            self._lock_path.unlink(missing_ok=True)

    def is_live(self) -> bool:
        """Tell whether another process is writing here."""
        return self._live_owner() is not None

    def remove_leftovers(self) -> list[str]:
        """Delete what a killed run left half-written, and return the names."""
        left = [path for folder in (self.path, self.checkpoints) for path in folder.glob(_TEMPORARY + "*")]
        for path in left:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return [path.name for path in left]

    def read_summary(self) -> dict[str, Any]:
        """Return summary.json, or `{}` when there is none or it cannot be read."""
        return _read_object(self.summary_path) or {}

    def write_summary(self, figures: Mapping[str, Any]) -> None:
        """Replace summary.json in one step; keys of `SUMMARY_KEYS` that are missing are written as null."""
        if self.is_writer:
            whole = {key: figures.get(key) for key in SUMMARY_KEYS} | dict(figures)
            with self.unless_full("summary.json"):
                replace_text(self.summary_path, json.dumps(_plain(whole), indent=2) + "\n")

    def update(self, figures: Mapping[str, Any]) -> None:
        """Write these figures over the ones summary.json holds, in one step."""
        self.write_summary(self.read_summary() | dict(figures))

    def append_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, in the file when this returns; a second call for a step joins its line.

        Args:
            step: optimizer updates done, never less than the last line's.
            metrics: full names to numbers; a number that is not finite is written as null.
        """
        if not self.is_writer:
            return
        with self.unless_full("metrics.jsonl"):
            self._metrics.append({"step": step} | _plain(dict(metrics)))
        self._sign_of_life()

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; a last line that a kill cut off is left out."""
        return self._metrics.read()

    def truncate_metrics(self, step: int) -> None:
        """Keep the lines at or before `step`: what a resumed run will write again must not stand there twice."""
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
        """Add one line of JSON to the file `name`, whose folder is made where it is missing."""
        if self.is_writer:
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            self.append_text(name, json.dumps(_plain(record)) + "\n")

    def append_text(self, name: str, text: str) -> None:
        """Add `text` to the end of the file `name`."""
        if self.is_writer:
            with self.unless_full(name), open(self.path / name, "a", encoding="utf-8") as file:
                file.write(text)

    @contextlib.contextmanager
    def unless_full(self, name: str) -> Iterator[None]:
        """Go on where the disk has no room for a note."""
        try:
            yield
        except OSError as error:
            if not is_full_disk(error):
                raise
            if not self._was_full:
                log.warning("%s: the disk or quota is full, and not all is written down; make room", self.path / name)
            self._was_full = True
        else:
            self._was_full = False

    def _probe(self) -> None:
        """Write and remove a small file, so that a folder without permission is found now and not hours later."""
        probe = self.path / f"{_TEMPORARY}probe-{os.getpid()}"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"hydra.run.dir={self.path}: cannot be written ({error.strerror or error}); "
                "choose a folder that you may write to, on a disk with room"
            ) from error

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Let one claimer at a time look at the lock; where the file system has no locks, go on without."""
        with open(self.path / f"{_TEMPORARY}claim", "w") as guard:
            with contextlib.suppress(OSError):
                fcntl.flock(guard, fcntl.LOCK_EX)
            yield

    def _live_owner(self) -> dict[str, Any] | None:
        """Return the process that holds the folder, None when it is free, ours, or its owner is dead."""
        owner = _read_object(self._lock_path)
        if owner is None or "pid" not in owner or owner == _this_process():
            return None
        if owner.get("host") == socket.gethostname():
            return owner if _started(owner["pid"]) == owner.get("started") else None
        return owner if time.time() - self._lock_path.stat().st_mtime < ABANDONED_AFTER else None

    def _sign_of_life(self) -> None:
        """Touch the lock now and then, so that a claimer on another host can tell a live run from a dead one."""
        if time.monotonic() - self._last_sign > 30:
            self._last_sign = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self._lock_path)

    def _trace_of_a_run(self) -> str:
        """Say what shows that a run was here, or return ""."""
        if self.summary_path.exists():
            return f"status {self.read_summary().get('status', 'unknown')!r}"
        names = [path.name for path in (self.metrics_path, *self.checkpoints.glob("step-*")) if path.exists()]
        return f"it has {names[0]}" if names else ""


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}


def _started(pid: int) -> float | None:
    """Return when the process began, None when it is gone: a number used again is not the same process."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: it has its old content or the new one, flushed to the disk."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        return parse_object(path.read_bytes())
    except OSError:
        return None


def _plain(value: Any) -> Any:
    """Turn tensors and NumPy numbers into plain ones, and what JSON has no word for (NaN, infinity) into null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
