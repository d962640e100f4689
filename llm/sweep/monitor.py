"""Shows the state, loss and remaining time of each job while a sweep runs, and keeps the manifest up to date."""

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from llm.sweep.job_progress import ProgressReader
from llm.sweep.manifest import Manifest, SweepJob, merge, read_notes
from llm.tables import format_seconds

TICK = 0.5
"""Seconds between two updates."""
COLOURS = {
    "running": "cyan",
    "finished": "green",
    "failed": "red",
    "pruned": "magenta",
    "stopped": "yellow",
    "pending": "dim",
}


class Monitor:
    """A thread that watches a sweep's folder, whatever launcher runs the jobs and on whatever machine.

    On a terminal it shows a table. Elsewhere it prints a line at each change of a job, and one per running job from
    time to time.

    Args:
        sweep: the sweep's folder.
        manifest: the manifest at the start.
        line_every: seconds between lines about a running job, where there is no terminal.
    """

    def __init__(self, sweep: Path, manifest: Manifest, *, line_every: float) -> None:
        self.sweep, self.manifest, self.line_every = sweep, manifest, line_every
        self._progress = ProgressReader()
        self._printed: dict[tuple[str, ...], tuple[str, int]] = {}
        self._printed_at: dict[tuple[str, ...], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sweep-monitor", daemon=True)
        self._live: Live | None = None

    def __enter__(self) -> "Monitor":
        if sys.stdout.isatty():
            live = self._live = Live(self._table(), console=Console(), auto_refresh=False)
            live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._tick()
        if self._live is not None:
            self._live.stop()

    def _watch(self) -> None:
        while not self._stop.wait(TICK):
            self._tick()

    def _tick(self) -> None:
        jobs = merge(self.manifest.jobs, read_notes(self.sweep))
        if jobs != self.manifest.jobs:
            self.manifest = replace(self.manifest, jobs=jobs)
            self.manifest.write(self.sweep)
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            self._print(jobs)

    def _print(self, jobs: Sequence[SweepJob]) -> None:
        """Print a line per job that changed, and per running job without a line for `line_every` seconds."""
        for number, job in enumerate(jobs):
            now, state = time.monotonic(), (job.state, job.attempts)
            is_new = self._printed.get(job.key) != state and job.state != "pending"
            is_due = job.state == "running" and now - self._printed_at.get(job.key, now) >= self.line_every
            if is_new or is_due:
                self._printed[job.key], self._printed_at[job.key] = state, now
                cells = [job.state, *(cell for cell in self._cells(job) if cell), job.brief(self.manifest.swept)]
                sys.stdout.write(f"{number + 1:>3}/{len(jobs)}  {'  '.join(cells)}\n")
                sys.stdout.flush()

    def _table(self) -> Table:
        jobs = self.manifest.jobs
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("", "state", "step", "loss", "time", "job"):
            table.add_column(name, no_wrap=name != "job")
        shown = [*enumerate(jobs)]
        room = max(4, Console().height - 6)
        if len(shown) > room:  # show running jobs first
            order = ("running", "failed", "stopped", "pruned", "finished", "pending")
            shown = sorted(sorted(shown, key=lambda item: order.index(item[1].state))[:room])
        for number, job in shown:
            state = f"[{COLOURS[job.state]}]{job.state}[/]"
            table.add_row(str(number + 1), state, *self._cells(job), job.brief(self.manifest.swept).replace("[", r"\["))
        if len(shown) < len(jobs):
            table.add_row("", f"[dim]and {len(jobs) - len(shown)} more[/]")
        return table

    def _cells(self, job: SweepJob) -> tuple[str, str, str]:
        """Return the step, the loss, and the remaining time of a running job or the duration of an ended one."""
        if job.state == "running":
            progress = self._progress.read(self.sweep / job.folder)
            if progress is None:
                return "starting", "", ""
            step = f"step {progress.step}" + (f"/{progress.total_steps}" if progress.total_steps else "")
            loss = "" if progress.loss is None else f"loss {progress.loss:.4f}"
            left = "" if progress.seconds_left is None else f"{format_seconds(progress.seconds_left)} left"
            return step, loss, left
        taken = "" if job.seconds is None or job.state == "pending" else format_seconds(job.seconds)
        if job.state == "finished":
            return "", "" if job.value is None else f"val/loss {job.value:.4f}", taken
        return job.reason[:100], "", taken
