"""Determines the outcome of a job that has ended."""

import contextlib
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llm.run_folder.folder import RunFolder
from llm.sweep.job_process import CONSOLE, Ended
from llm.sweep.manifest import SweepJob


def outcome_of_process(job: SweepJob, path: Path, ended: Ended) -> SweepJob:
    """Return the job with its outcome, from its exit status, its summary and the errors that it printed."""
    status = ended.status
    summary = RunFolder(path, is_writer=False).read_summary()
    word, _, why = str(summary.get("status") or "").partition(": ")
    if status == 0:
        return replace(job, state="finished", value=summary.get("val/loss"), exit_status=0)
    if ended.behind and status in (-signal.SIGTERM, 128 + signal.SIGTERM):
        if word == "finished":  # the job ended before it received the signal
            return replace(job, state="finished", value=summary.get("val/loss"), exit_status=status)
        loss = ended.behind.loss if math.isfinite(ended.behind.loss) else None
        return replace(job, state="pruned", reason=ended.behind.why, value=loss, exit_status=status)
    if status < 0:
        return replace(job, state="failed", reason=f"killed by {signal_name(-status)}", exit_status=status)
    if status > 128 and word == "stopped":
        return replace(job, state="stopped", reason=why, exit_status=status)
    reason = why if word == "failed" and why else _last_errors(path / CONSOLE, ended.console_start)
    return replace(job, state="failed", reason=reason or f"exit status {status}", exit_status=status)


def outcome_of_call(job: SweepJob, run: Callable[[], float | None]) -> SweepJob:
    """Call `run` and return the job with its outcome. Exceptions do not propagate, so that other jobs still run."""
    try:
        return replace(job, state="finished", value=run())
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        if status > 128:
            return replace(job, state="stopped", reason=signal_name(status - 128), exit_status=status)
        return replace(job, state="failed", reason=f"exit status {status}", exit_status=status)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return replace(job, state="failed", reason=reason)


def _last_errors(console: Path, start: int) -> str:
    """Return the errors that the job printed after the first `start` bytes, or else its last line."""
    with contextlib.suppress(OSError), open(console, "rb") as file:
        file.seek(max(start, file.seek(0, 2) - 20_000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines[-20:] if line.startswith("error: ")]
        return "; ".join(errors) or (lines[-1] if lines else "")
    return ""


def signal_name(number: int) -> str:
    """Return the name of a signal, such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def signal_number(name: str) -> int:
    """Return the number of the signal that a text starts with, SIGTERM where it names none."""
    number = getattr(signal, name.split(" ")[0], None)
    return int(number) if number is not None else int(signal.SIGTERM)
