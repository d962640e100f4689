"""Runs a sweep for `-m`: Hydra's sweepers choose the jobs, and its launchers start each one as a run of its own."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from llm.commands.arguments import CommandLine
from llm.commands.compose import compose_with_hydra, plain_part
from llm.commands.sweep_ahead import Ahead, look_ahead, refuse_if_all_jobs_fail
from llm.commands.sweep_job import JobFunction, Task, logging_restored
from llm.config.conf import entry_script
from llm.config.quoting import quote
from llm.errors import ConfigError
from llm.sweep.manifest import MANIFEST, read_notes, read_sweep
from llm.sweep.options import split_options
from llm.sweep.sweep_folder import exit_status, open_sweep, resolve_folder, resumed_command
from llm.sweep.sweep_plan import SweepPlan, plain_command

log = logging.getLogger(__name__)


def run_sweep(line: CommandLine, *, task: Task, check: Callable[[dict[str, Any]], Any]) -> int:
    """Run a sweep and its report; return the exit status: 0, or 1 where a job did not finish.

    Raises:
        ConfigError: a mistake that all jobs share, or that `check` finds in every job.
        SystemExit: a signal stopped the sweep.
    """
    options, own = split_options(line.overrides, line.config_dir / "sweep.yaml")
    command = resumed_command(options.resume, own)
    line = line.with_overrides(command)
    ahead = look_ahead(line)
    if "plan=true" in command:
        _print_plans(ahead, line, task, check)
        return 0
    folder = resolve_folder(options.resume, Path(ahead.hydra.sweep.dir), command)
    subdir = dict(OmegaConf.to_container(ahead.hydra.sweep, resolve=False)).get("subdir")  # type: ignore[call-overload]
    if os.path.normpath(str(subdir)) == ".":
        raise ConfigError(
            "hydra.sweep.subdir=.: each job needs its own folder, such as hydra.sweep.subdir=${hydra.job.num}"
        )
    if not (folder / MANIFEST).exists():
        shared = line.with_overrides(ahead.for_jobs)
        refuse_if_all_jobs_fail(ahead.jobs or ahead.samples, shared, check, are_samples=not ahead.is_basic)
    pruning = options.pruning(read_sweep(folder).prune if (folder / MANIFEST).exists() else None)
    plan = replace(_plan(ahead, folder, line), prune=pruning)
    with (
        open_sweep(folder, command, ahead.jobs, ahead.swept, options.line_every, pruning) as monitor,
        _leaving_in_order(),
        logging_restored(),
        _without_a_best_trial(folder),
    ):
        sys.argv[1:] = ["-m", *command, *_for_hydra(ahead, folder), *line.flags]
        function = JobFunction(plan, None if options.isolate else task, check)
        hydra.main(version_base="1.3", config_path=str(line.config_dir), config_name=line.config_name)(function)()
    if options.report and any(job.state != "pending" for job in monitor.manifest.jobs):
        from llm.report.report_folder import write_report  # imports SciPy, which starting a sweep does not need

        report = write_report([folder])
        sys.stdout.write(f"\n{report.text}\n\nreport       {report.page}\n")
    return exit_status(monitor.manifest)


def _print_plans(ahead: Ahead, line: CommandLine, task: Task, check: Callable[[dict[str, Any]], Any]) -> None:
    """Print the plan of each job without training.

    Raises:
        ConfigError: the sweeper chooses its jobs while they run.
    """
    if not ahead.is_basic:
        raise ConfigError("plan=true: this sweeper chooses its jobs from results; plan one run, without -m")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)  # Hydra configures runs alone
    for job in ahead.jobs:
        log.info("%s", " ".join(o for o in job.overrides if o.partition("=")[0].lstrip("+~") in ahead.swept))
        cfg = compose_with_hydra(line.with_overrides([*job.overrides, *ahead.for_jobs]))
        task(check(plain_part(cfg)), Path(ahead.hydra.sweep.dir))


def _plan(ahead: Ahead, folder: Path, line: CommandLine) -> SweepPlan:
    script = line.config_dir.parent / f"{line.command}.py"  # a checkout, or a project with its own conf/
    command = plain_command(script if script.is_file() else entry_script(line.command), (*line.flags, *ahead.for_jobs))
    wanted = ahead.hydra.launcher.get("n_jobs") or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    side_by_side = wanted if wanted > 0 else max(1, cores + 1 + wanted)
    if ahead.is_basic:
        side_by_side = min(side_by_side, len(ahead.jobs))
    is_divided = side_by_side > 1 and "OMP_NUM_THREADS" not in os.environ
    return SweepPlan(
        sweep=folder,
        command=command,
        owner=os.getpid(),
        side_by_side=side_by_side,
        threads=max(1, cores // side_by_side) if is_divided else None,
        devices=_devices() if side_by_side > 1 else (),
        environment={"WANDB_RUN_GROUP": folder.name, "WANDB_JOB_TYPE": "sweep"},
        swept=ahead.swept,
        raises=not ahead.is_basic,
    )


def _devices() -> tuple[str, ...]:
    """Return the GPUs that are divided among the jobs; none where there is at most one."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = tuple(named.split(",")) if named else tuple(map(str, range(torch.cuda.device_count())))
    return devices if len(devices) > 1 else ()


def _for_hydra(ahead: Ahead, folder: Path) -> list[str]:
    """Return overrides for Hydra itself: the sweep's folder, and no log or notes, which the jobs write."""
    added = [f"hydra.sweep.dir={quote(str(folder))}", "hydra/hydra_logging=disabled"]
    added += ["hydra/job_logging=disabled", "hydra.output_subdir=null"]
    if "max_failure_rate" in ahead.hydra.sweeper:  # Optuna: a failed trial is a result as well
        added.append("hydra.sweeper.max_failure_rate=1.0")
    sampler = ahead.hydra.sweeper.get("sampler") or {}
    if sampler.get("seed", 0) is None:  # a resumed study asks for the same trials again
        added.append("hydra.sweeper.sampler.seed=0")
    return added


@contextlib.contextmanager
def _without_a_best_trial(folder: Path) -> Iterator[None]:
    """Ignore the error of a search in which every job failed: its sweeper finds no best trial at the end."""
    try:
        yield
    except ValueError:
        notes = read_notes(folder)
        if not notes or any(note.state != "failed" for note in notes):
            raise


@contextlib.contextmanager
def _leaving_in_order() -> Iterator[None]:
    """Turn a signal between two jobs into an exit, so that the manifest is still written."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
