"""Starts, resumes or skips one sweep job, and records its outcome."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llm.errors import CrucibleError
from llm.run_folder.folder import RunFolder
from llm.sweep.follow import follow
from llm.sweep.job_folder import claim_folder, clear_folder
from llm.sweep.job_outcome import outcome_of_call, outcome_of_process, signal_number
from llm.sweep.job_process import run_process
from llm.sweep.manifest import SweepJob
from llm.sweep.sweep_plan import SweepPlan

InProcess = Callable[[Path, bool], float | None]
"""Runs a job in this process: `f(folder, is resumed)` returns the validation loss."""


class JobError(CrucibleError):
    """A job that did not finish. The sweep continues without it."""


def run_job(
    plan: SweepPlan, overrides: tuple[str, ...], folder: Path, in_process: InProcess | None = None
) -> float | None:
    """Run one job, resume it from its checkpoint, or skip it where it has finished. Return its validation loss.

    Args:
        plan: settings that all jobs share.
        overrides: the job's own command line.
        folder: the folder of a new job. A job that was started before keeps its earlier folder.
        in_process: runs the job in this process. None means that the job gets its own process.

    Raises:
        JobError: the job failed and the plan asks for an exception.
        SystemExit: a signal stopped the job and with it the sweep.
    """
    follow(plan.owner)
    job = claim_folder(plan.sweep, overrides, folder)
    path = plan.sweep / job.folder
    while RunFolder(path, is_writer=False).is_live():
        time.sleep(0.5)  # a job of a sweep that was killed may still be saving its checkpoint
    summary = RunFolder(path, is_writer=False).read_summary()
    if summary.get("status") == "finished":
        replace(job, state="finished", reason="", value=summary.get("val/loss")).write(plan.sweep)
        return summary.get("val/loss")
    if job.state != "pruned":
        job = _run(plan, job, path, in_process)
    return _value(plan, job)


def _run(plan: SweepPlan, job: SweepJob, path: Path, in_process: InProcess | None) -> SweepJob:
    """Run a job that has not finished and return it with its outcome, which is also written to its folder."""
    is_resumed = any(path.glob("checkpoints/step-*/manifest.json"))
    if not is_resumed:
        clear_folder(path)
    began = time.time()
    job = replace(job, state="running", reason="", attempts=job.attempts + 1, began=began, value=None)
    job.write(plan.sweep)
    if in_process is None:
        job = outcome_of_process(job, path, run_process(plan, job, path, is_resumed))
    else:
        job = outcome_of_call(job, lambda: in_process(path, is_resumed))
    job = replace(job, seconds=time.time() - began)
    job.write(plan.sweep)
    if job.state == "stopped":
        raise SystemExit(128 + signal_number(job.reason))
    return job


def _value(plan: SweepPlan, job: SweepJob) -> float | None:
    """Return the loss of a job that has ended. A pruned job counts with its last loss, so that a search learns from it.

    Raises:
        JobError: the job has no finite loss and the plan asks for an exception.
    """
    if job.value is not None and math.isfinite(job.value):
        return job.value
    if plan.raises:
        raise JobError(f"{' '.join(job.overrides)}: {job.reason or 'no finite validation loss'}")
    return math.nan
