"""`-m`: Hydra's sweepers and launchers choose and place the jobs; each is a plain run, kept apart from the others."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from llm.commands.refused_jobs import refuse_if_all_jobs_fail
from llm.config.conf import entry_script
from llm.config.quoting import quote
from llm.config.resume import merge_resumed
from llm.errors import ConfigError
from llm.report.report_folder import write_report
from llm.sweep.job import run_job
from llm.sweep.manifest import MANIFEST, SweepJob, read_notes, read_sweep
from llm.sweep.options import split_options
from llm.sweep.plan import SweepPlan, plain_command
from llm.sweep.sweep import exit_status, open_sweep, resolve_folder, resumed_command

MULTIRUN = ("-m", "--multirun")
WITH_VALUE = ("-cd", "--config-dir", "-cp", "--config-path", "-cn", "--config-name", "-p", "--package")
Task = Callable[[dict[str, Any], Path], float | None]


@dataclass(frozen=True)
class Ahead:
    """What is known of a sweep before it starts: Hydra's settings, what is swept, and the jobs where they are fixed."""

    hydra: Any
    swept: tuple[str, ...]
    jobs: tuple[SweepJob, ...]

    @property
    def is_basic(self) -> bool:
        """Whether the jobs are the product of what was given, known ahead."""
        return str(self.hydra.sweeper._target_).endswith("BasicSweeper")


def is_multirun(arguments: Sequence[str]) -> bool:
    """Tell whether a command line asks for a sweep; plans, which train nothing, are left to Hydra to print in turn."""
    return bool({*MULTIRUN, "hydra.mode=MULTIRUN"} & set(arguments)) and "plan=true" not in arguments


def run_sweep(
    arguments: Sequence[str],
    *,
    task: Task,
    config_name: str,
    config_dir: Path,
    check: Callable[[dict[str, Any]], Any] | None = None,
) -> int:
    """Run a sweep and its report; return the exit status: 0, or 1 where a job did not finish.

    Raises:
        ConfigError: a mistake in what all jobs share, or one that `check` finds in every job.
        SystemExit: a signal stopped it.
    """
    options, own = split_options([a for a in arguments if a not in MULTIRUN], config_dir / "sweep.yaml")
    command = resumed_command(options.resume, own)
    flags, overrides = _split_flags(command)
    ahead = look_ahead(overrides, config_name=config_name, config_dir=config_dir)
    folder = resolve_folder(options.resume, Path(ahead.hydra.sweep.dir), command)
    subdir = dict(OmegaConf.to_container(ahead.hydra.sweep, resolve=False)).get("subdir")  # type: ignore[call-overload]
    if os.path.normpath(str(subdir)) == ".":
        raise ConfigError(
            "hydra.sweep.subdir=.: each job needs its own folder, such as hydra.sweep.subdir=${hydra.job.num}"
        )
    if check is not None and not (folder / MANIFEST).exists():
        refuse_if_all_jobs_fail(ahead.jobs, check=check, config_name=config_name)
    beside = config_dir.parent / f"{config_name}.py"  # a checkout, or a project with its own conf/
    script = beside if beside.is_file() else entry_script(config_name)
    pruning = options.pruning(read_sweep(folder).prune if (folder / MANIFEST).exists() else None)
    plan = replace(_plan(ahead, folder, plain_command(script, tuple(flags))), prune=pruning)
    with (
        open_sweep(folder, command, ahead.jobs, ahead.swept, options.line_every, pruning) as monitor,
        _leaving_in_order(),
        _logging_restored(),
    ):
        sys.argv[1:] = ["-m", *command, *_hydra_overrides(ahead, folder)]
        function = JobFunction(plan, None if options.isolate else task)
        with _without_a_best_trial(folder):
            hydra.main(version_base="1.3", config_path=str(config_dir), config_name=config_name)(function)()
    if options.report and any(job.state != "pending" for job in monitor.manifest.jobs):
        report = write_report([folder])
        sys.stdout.write(f"\n{report.text}\n\nreport       {report.page}\n")
    return exit_status(monitor.manifest)


@dataclass(frozen=True)
class JobFunction:
    """What Hydra's launchers call for each job, here, in workers, or on other machines: hence an object to pickle.

    Args:
        plan: what the jobs have in common.
        task: runs a job in the caller's process; None: each has a process of its own.
    """

    plan: SweepPlan
    task: Task | None

    def __call__(self, cfg: DictConfig) -> float | None:
        own = HydraConfig.get()
        folder = Path(own.runtime.output_dir)
        here = None if self.task is None else partial(self._here, self.task, cfg)
        value = run_job(self.plan, tuple(map(str, own.overrides.task)), folder, here)
        if folder.is_dir() and not any(folder.iterdir()) and folder.stat().st_ctime >= self.plan.started:
            folder.rmdir()  # Hydra created it, but the job has another folder
        return value

    @staticmethod
    def _here(task: Task, cfg: DictConfig, path: Path, is_resumed: bool) -> float | None:
        from llm.config.files import load, to_plain  # with torch behind it, which workers that only wait do without

        plain = to_plain(cfg)
        if is_resumed:
            plain = merge_resumed(load(path / "config.yaml"), plain | {"resume": str(path)}, [f"resume={path}"])
        with _hydra_notes(cfg, path):
            return task(plain, path)


@contextlib.contextmanager
def _hydra_notes(cfg: DictConfig, path: Path) -> Iterator[None]:
    """Write Hydra's notes and the log of a job into the job's own folder.

    Hydra itself would write them into a folder of its choice, before it is known whether that folder is free.
    """
    own = HydraConfig.get()
    (path / ".hydra").mkdir(exist_ok=True)
    notes = {"config": cfg, "hydra": OmegaConf.create({"hydra": own}), "overrides": own.overrides.task}
    for name, note in notes.items():
        OmegaConf.save(note, path / ".hydra" / f"{name}.yaml")
    handler = logging.FileHandler(path / f"{own.job.name}.log")
    with _logging_restored():
        for logger in _loggers():  # Hydra's configuration without a log has disabled them
            logger.disabled = False
        logging.getLogger().handlers = [handler]
        logging.getLogger().setLevel(logging.INFO)
        yield
    handler.close()


@contextlib.contextmanager
def _logging_restored() -> Iterator[None]:
    """Restore the handlers, the level and the disabled loggers at the end, which Hydra configures for the process."""
    root = logging.getLogger()
    level, handlers, disabled = root.level, root.handlers[:], {logger: logger.disabled for logger in _loggers()}
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers = handlers
        for logger, is_disabled in disabled.items():
            logger.disabled = is_disabled


def _loggers() -> list[logging.Logger]:
    return [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]


def look_ahead(overrides: Sequence[str], *, config_name: str, config_dir: Path) -> Ahead:
    """Compose with the first value of whatever is swept, and list the jobs where Hydra's own sweeper makes them.

    Each other option of a swept group is composed as well: a mistake in one is told before any job begins.

    Raises:
        HydraException: an option that does not exist, or a key that it does not have.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        given = parser.parse_overrides(list(overrides))
        composed = compose(config_name, overrides=[_first(o) for o in given], return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
        settings = OmegaConf.create(OmegaConf.to_container(composed.hydra, resolve=False))
        settings.sweep.dir = composed.hydra.sweep.dir
        params = composed.hydra.sweeper.get("params") or {}
        added = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
        for overrides in _other_options([*added, *given]):
            compose(config_name, overrides=overrides, return_hydra_config=True)
    GlobalHydra.instance().clear()
    everything = [o for o in [*added, *given] if not o.get_key_element().lstrip("+~").startswith("hydra")]
    swept = tuple(o.get_key_element().lstrip("+~") for o in everything if o.is_sweep_override())
    jobs: tuple[SweepJob, ...] = ()
    if str(settings.sweeper._target_).endswith("BasicSweeper"):
        (batch,) = BasicSweeper.split_arguments(everything, None)
        jobs = tuple(SweepJob(overrides=tuple(job)) for job in batch)
    return Ahead(settings, swept, jobs)


def _other_options(given: Sequence[Override]) -> Iterator[list[str]]:
    """Yield the overrides with each option but the first of each swept group, all else that is swept at its first."""
    loader = GlobalHydra.instance().config_loader()
    first = [_first(override) for override in given]
    for number, override in enumerate(given):
        if override.is_discrete_sweep() and loader.get_group_options(override.key_or_group):
            for value in [*override.sweep_string_iterator()][1:]:
                yield [*first[:number], f"{override.get_key_element()}={value}", *first[number + 1 :]]


def _first(override: Override) -> str:
    """Return an override with the first of the values that it sweeps over."""
    if not override.is_sweep_override():
        return str(override.input_line)
    if override.is_discrete_sweep():
        return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
    return f"{override.get_key_element()}={override.value().start}"  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


def _plan(ahead: Ahead, folder: Path, command: tuple[str, ...]) -> SweepPlan:
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
    """Return the GPUs to share out; one alone is no matter of sharing."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = tuple(named.split(",")) if named else tuple(map(str, range(torch.cuda.device_count())))
    return devices if len(devices) > 1 else ()


def _hydra_overrides(ahead: Ahead, folder: Path) -> list[str]:
    """Return what Hydra itself is told: where, and to leave console and notes to the jobs."""
    told = [f"hydra.sweep.dir={quote(str(folder))}", "hydra/hydra_logging=disabled"]
    told += ["hydra/job_logging=disabled", "hydra.output_subdir=null"]
    if "max_failure_rate" in ahead.hydra.sweeper:  # Optuna: a failed trial is a result as well
        told.append("hydra.sweeper.max_failure_rate=1.0")
    sampler = ahead.hydra.sweeper.get("sampler") or {}
    if sampler.get("seed", 0) is None:  # a resumed study asks for the same trials again
        told.append("hydra.sweeper.sampler.seed=0")
    return told


def _split_flags(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return Hydra's own flags, with their values, and the overrides."""
    flags, overrides, takes_value = [], [], False
    for argument in command:
        is_flag = takes_value or argument.startswith("-")
        (flags if is_flag else overrides).append(argument)
        takes_value = argument in WITH_VALUE
    return flags, overrides


@contextlib.contextmanager
def _without_a_best_trial(folder: Path) -> Iterator[None]:
    """Let a search end like any sweep where every job failed: its sweeper, at the end, looks for a best one."""
    try:
        yield
    except ValueError:
        notes = read_notes(folder)
        if not notes or any(note.state != "failed" for note in notes):
            raise


@contextlib.contextmanager
def _leaving_in_order() -> Iterator[None]:
    """Turn what stops a sweep between two jobs into an exit that still writes the manifest."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
