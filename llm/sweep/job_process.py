"""Runs a job as a plain run in a process group of its own, forwards signals to it, and ends it where a rule says so."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from llm.config.quoting import quote
from llm.distributed.launch import signal_handler
from llm.sweep.follow import PARENT
from llm.sweep.manifest import SweepJob
from llm.sweep.prune import Behind, Pruner
from llm.sweep.sweep_plan import SweepPlan

CONSOLE = "console.log"
"""File of a job's folder with everything that the job printed."""
LOOK_EVERY = 0.25
"""Seconds between checks of a job that may be pruned."""


class Ended(NamedTuple):
    """How the process of a job ended."""

    status: int
    """Its exit status, negative for a signal."""
    behind: Behind | None
    """Why it was pruned, None where it was not."""
    console_start: int
    """Bytes of the console log that earlier attempts had written."""


def run_process(plan: SweepPlan, job: SweepJob, path: Path, is_resumed: bool) -> Ended:
    """Run the job as a plain run and return how it ended."""
    folder = quote(str(path))
    own = [f"resume={folder}"] if is_resumed else [*job.overrides, f"hydra.run.dir={folder}"]
    log = path / CONSOLE
    console_start = log.stat().st_size if log.exists() else 0
    with _device_share(plan) as devices, open(log, "ab") as console:
        process = subprocess.Popen(
            [*plan.command, *own],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_environment(plan, job), **devices},
            start_new_session=True,
        )
        with _forwarding(process) as forwarded:
            behind = None if plan.prune is None else _prune(process, Pruner(plan.prune, plan.sweep, job))
            status = process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # ranks and data workers that still run
    return Ended(status, None if forwarded else behind, console_start)


def _prune(process: subprocess.Popen[bytes], pruner: Pruner) -> Behind | None:
    """Wait until the job ends, or send it SIGTERM when the rule asks for that. It then saves a checkpoint and ends."""
    while process.poll() is None:
        if behind := pruner.look():
            process.terminate()
            return behind
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_EVERY)
    return None


def _environment(plan: SweepPlan, job: SweepJob) -> dict[str, str]:
    """Return the environment variables that the job gets in addition to the sweep's own."""
    added = {PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1", **plan.environment}
    if plan.threads is not None:
        added |= {"OMP_NUM_THREADS": str(plan.threads), "MKL_NUM_THREADS": str(plan.threads)}
    tags = [override for override in job.overrides if override.split("=")[0].lstrip("+~") in plan.swept]
    if tags:
        added["WANDB_TAGS"] = ",".join(tag.replace(",", ";")[:64] for tag in tags)
    return added


@contextlib.contextmanager
def _device_share(plan: SweepPlan) -> Iterator[dict[str, str]]:
    """Reserve a share of the GPUs while a job runs, so that jobs at the same time use different GPUs."""
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
    """Return the devices of one of `slots` jobs: an equal part, or one shared device where there are too few."""
    if len(devices) < slots:
        return (devices[slot % len(devices)],)
    return devices[slot * len(devices) // slots : (slot + 1) * len(devices) // slots]


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Forward stopping signals to the job, which saves a checkpoint and ends. Yield the list of forwarded signals."""
    forwarded: list[int] = []

    def forward(number: int, _: Any) -> None:
        forwarded.append(number)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield forwarded
        return
    with signal_handler(forward):
        yield forwarded
