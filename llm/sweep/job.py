"""One job of a sweep: begun, gone on with, or left as it is; watched; and noted."""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llm.errors import CrucibleError
from llm.run_folder.folder import RunFolder
from llm.sweep.follow import PARENT, follow
from llm.sweep.manifest import NOTE, SweepJob, read_notes, signal_name
from llm.sweep.prune import Behind, Pruner, Pruning

CONSOLE = "console.log"
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
KEPT = (NOTE, ".hydra")
"""What stays of a start that is begun anew, beside its logs."""
LOOK_EVERY = 0.25
"""Seconds between looks at a job that may be pruned."""


class JobError(CrucibleError):
    """A job that did not finish; the sweep goes on without it."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What the jobs of one sweep have in common.

    Args:
        sweep: the sweep's folder.
        command: what starts a plain run: the interpreter, the script, its flags.
        owner: process of the sweep; a job ends when it dies.
        side_by_side: how many jobs run at a time on this machine.
        threads: for each job, None to leave them as they are.
        devices: GPUs to share out between jobs that run side by side; empty: each sees all.
        environment: variables that each job gets.
        swept: keys that differ between jobs.
        raises: a failed job raises, for sweepers that ask for it; else its value is NaN.
        prune: the rule by which jobs end early, None for none.
    """

    sweep: Path
    command: tuple[str, ...]
    owner: int
    side_by_side: int = 1
    threads: int | None = None
    devices: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    swept: tuple[str, ...] = ()
    raises: bool = False
    prune: Pruning | None = None


def run_job(
    plan: SweepPlan,
    overrides: tuple[str, ...],
    folder: Path,
    in_process: Callable[[Path, bool], float | None] | None = None,
) -> float | None:
    """Run one job unless it is done, go on with it where it has a checkpoint, and return its validation loss.

    Args:
        plan: what the jobs have in common.
        overrides: the job's own command line.
        folder: where it would go; the same job's folder of an earlier start goes before.
        in_process: runs it here, as `f(folder, is resumed)`; None: in a process of its own.

    Raises:
        JobError: it failed, where the plan asks for that.
        SystemExit: a signal stopped it, and so the sweep.
    """
    follow(plan.owner)
    job = _claim(plan, overrides, folder)
    path = plan.sweep / job.folder
    while RunFolder(path, is_writer=False).is_live():
        time.sleep(0.5)  # the job of a sweep that was killed may be on its way out
    summary = RunFolder(path, is_writer=False).read_summary()
    if summary.get("status") == "finished":
        replace(job, state="finished", reason="", value=summary.get("val/loss")).write(plan.sweep)
        return summary.get("val/loss")
    if job.state == "pruned":
        return _value(plan, job)
    is_resumed = any(path.glob("checkpoints/step-*/manifest.json"))
    if not is_resumed:
        _clear(path)
    began = time.time()
    job = replace(job, state="running", reason="", attempts=job.attempts + 1, began=began, value=None)
    job.write(plan.sweep)
    if in_process is None:
        told = (path / CONSOLE).stat().st_size if (path / CONSOLE).exists() else 0
        ended = _judge(job, path, *_run_process(plan, job, path, is_resumed), told)
    else:
        ended = _run_here(job, lambda: in_process(path, is_resumed))
    ended = replace(ended, seconds=time.time() - began)
    ended.write(plan.sweep)
    if ended.state == "stopped":
        raise SystemExit(128 + _signal_number(ended.reason))
    return _value(plan, ended)


def _value(plan: SweepPlan, job: SweepJob) -> float | None:
    """Return the loss of a job that has ended: the last one of a pruned job, so that a search learns from it as well.

    Raises:
        JobError: it has none, where the plan asks for that.
    """
    if job.value is not None and math.isfinite(job.value):
        return job.value
    if plan.raises:
        raise JobError(f"{' '.join(job.overrides)}: {job.reason or 'no finite validation loss'}")
    return math.nan


def _claim(plan: SweepPlan, overrides: tuple[str, ...], folder: Path) -> SweepJob:
    """Return the job's note of an earlier start, or a new one in a folder that is no other job's."""
    job = SweepJob(overrides=overrides)
    notes = read_notes(plan.sweep)
    earlier = next((note for note in notes if note.key == job.key), None)
    if earlier is not None:
        return earlier
    taken = {note.folder for note in notes}
    names = (folder.with_name(f"{folder.name}{suffix}") for suffix in ["", *(f"-{n}" for n in range(2, 10_000))])
    path = next(name for name in names if str(name.relative_to(plan.sweep)) not in taken)
    path.mkdir(parents=True, exist_ok=True)
    return replace(job, folder=str(path.relative_to(plan.sweep)))


def _clear(path: Path) -> None:
    """Remove what a start without a checkpoint left: nothing of it can be gone on with."""
    for left in path.iterdir():
        if left.name in KEPT or left.suffix == ".log":
            continue
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def _run_process(plan: SweepPlan, job: SweepJob, path: Path, is_resumed: bool) -> tuple[int, Behind | None]:
    """Run the job as a plain run of its own process group and pass signals on; return its exit status, and what it was
    pruned for.
    """
    quoted = str(path).replace("\\", "\\\\").replace("'", "\\'")
    own = [f"resume={path}"] if is_resumed else [*job.overrides, f"hydra.run.dir='{quoted}'"]
    with _devices(plan) as devices, open(path / CONSOLE, "ab") as console:
        process = subprocess.Popen(
            [*plan.command, *own],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_environment(plan, job), **devices},
            start_new_session=True,
        )
        with _passing_on(process) as passed:
            behind = None if plan.prune is None else _prune(process, Pruner(plan.prune, plan.sweep, job))
            status = process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # ranks and workers that outlived their leader
    return status, None if passed else behind


def _prune(process: subprocess.Popen[bytes], pruner: Pruner) -> Behind | None:
    """Wait until a job ends by itself, or tell it to, as a scheduler would, once it has fallen behind."""
    while process.poll() is None:
        if behind := pruner.look():
            process.terminate()
            return behind
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_EVERY)
    return None


def _environment(plan: SweepPlan, job: SweepJob) -> dict[str, str]:
    """Return what the job finds in its environment beside the sweep's own."""
    added = {PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1", **plan.environment}
    if plan.threads is not None:
        added |= {"OMP_NUM_THREADS": str(plan.threads), "MKL_NUM_THREADS": str(plan.threads)}
    if os.environ.get("SLURM_NTASKS") == "1":
        added["SLURM_JOB_NAME"] = "bash"  # Lightning then starts the ranks itself, instead of waiting for Slurm's
    tags = [override for override in job.overrides if override.split("=")[0].lstrip("+~") in plan.swept]
    if tags:
        added["WANDB_TAGS"] = ",".join(tag.replace(",", ";")[:64] for tag in tags)
    return added


@contextlib.contextmanager
def _devices(plan: SweepPlan) -> Iterator[dict[str, str]]:
    """Hold a share of the GPUs while a job runs, so that jobs side by side do not meet on one."""
    if plan.side_by_side < 2 or not plan.devices:
        yield {}
        return
    while True:
        for slot in range(plan.side_by_side):
            with contextlib.suppress(Timeout), FileLock(plan.sweep / f".slot-{slot}.lock", timeout=0):
                yield {"CUDA_VISIBLE_DEVICES": ",".join(share(plan.devices, slot, plan.side_by_side))}
                return
        time.sleep(0.2)


def share(devices: tuple[str, ...], slot: int, slots: int) -> tuple[str, ...]:
    """Return the devices of one of `slots` jobs: an equal part, or one that several share where there are too few."""
    if len(devices) < slots:
        return (devices[slot % len(devices)],)
    return devices[slot * len(devices) // slots : (slot + 1) * len(devices) // slots]


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Hand every signal that would stop us to the job, which saves a checkpoint and ends; yield those handed on."""
    passed: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        passed.append(number)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield passed
        return
    previous = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield passed
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _judge(job: SweepJob, path: Path, status: int, behind: Behind | None, told: int) -> SweepJob:
    """Say what became of a job from its exit status, what it was pruned for, its summary, and what it wrote after the
    first `told` bytes.
    """
    summary = RunFolder(path, is_writer=False).read_summary()
    word, _, why = str(summary.get("status") or "").partition(": ")
    if status == 0:
        return replace(job, state="finished", value=summary.get("val/loss"), exit_status=0)
    if behind and status in (-signal.SIGTERM, 128 + signal.SIGTERM):
        if word == "finished":  # before it could be told
            return replace(job, state="finished", value=summary.get("val/loss"), exit_status=status)
        loss = behind.loss if math.isfinite(behind.loss) else None
        return replace(job, state="pruned", reason=behind.why, value=loss, exit_status=status)
    if status < 0:
        return replace(job, state="failed", reason=f"killed by {signal_name(-status)}", exit_status=status)
    if status > 128 and word == "stopped":
        return replace(job, state="stopped", reason=why, exit_status=status)
    reason = why if word == "failed" and why else _last_words(path / CONSOLE, told)
    return replace(job, state="failed", reason=reason or f"exit status {status}", exit_status=status)


def _last_words(console: Path, since: int) -> str:
    """Return the errors that the job told, or the last line it wrote."""
    with contextlib.suppress(OSError), open(console, "rb") as file:
        file.seek(max(since, file.seek(0, 2) - 20_000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        told = [line.removeprefix("error: ") for line in lines[-20:] if line.startswith("error: ")]
        return "; ".join(told) or (lines[-1] if lines else "")
    return ""


def _run_here(job: SweepJob, run: Callable[[], float | None]) -> SweepJob:
    try:
        return replace(job, state="finished", value=run())
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        if status > 128:
            return replace(job, state="stopped", reason=signal_name(status - 128), exit_status=status)
        return replace(job, state="failed", reason=f"exit status {status}", exit_status=status)
    except Exception as error:  # whatever it is: the other jobs go on
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return replace(job, state="failed", reason=reason)


def _signal_number(name: str) -> int:
    number = getattr(signal, name.split(" ")[0], None)
    return int(number) if number is not None else int(signal.SIGTERM)


def plain_command(script: Path, flags: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return what starts a plain run of `script` with this interpreter."""
    return (sys.executable, str(script), *flags)
