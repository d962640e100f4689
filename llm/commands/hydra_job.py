"""Runs one job in its folder: a new run, a resumed one, or one rank of several processes."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import JobStatus, run_job
from hydra.types import HydraContext
from omegaconf import DictConfig, read_write

from llm.commands.arguments import CommandLine
from llm.commands.compose import (
    Checked,
    NotComposedError,
    compose_with_hydra,
    open_hydra,
    plain_part,
    raise_with_others,
)
from llm.commands.config_groups import keys_set_by
from llm.commands.console import print_own_lines
from llm.commands.newest_run import folder_to_resume
from llm.commands.signals import CommandStoppedError
from llm.config.files import load
from llm.config.quoting import quote
from llm.distributed.launch import Launch, adopt, find_launch, start_processes
from llm.errors import ConfigError, CrucibleError
from llm.run_folder.folder import RunFolder
from llm.run_folder.ownership import HYDRA_NOTES, discard_empty, remember_contents


def run_once(
    line: CommandLine,
    *,
    task: Callable[[Checked, Path], float | None],
    check: Callable[[dict[str, Any]], Checked],
) -> None:
    """Compose a command line, check the result, and run `task` in the run folder.

    Raises:
        CrucibleError: a mistake in the command line or in what it names, or a failure of the run.
        CommandStoppedError: a signal stopped the run, here or on a rank.
    """
    launch = find_launch()
    cfg, plain, resumed = compose_run(line, check)
    _place(cfg, resumed, line, launch)
    folder = Path(cfg.hydra.run.dir)
    checked = check(plain)
    if resumed is None and cfg.hydra.output_subdir is not None:  # an evaluation writes no notes of Hydra
        RunFolder(folder, is_writer=False).check_free(*HYDRA_NOTES)
    remember_contents(folder)
    from llm.config.sizes import world_size  # imports torch, which a mistake in a key does not need

    processes = world_size(plain["trainer"]) if launch is None and "trainer" in plain else 1
    if processes > 1:
        _run_in_folder(cfg, line, lambda: _start_ranks(processes, folder.absolute(), is_resumed=resumed is not None))
    else:
        _run_in_folder(cfg, line, lambda: task(checked, folder.absolute()))


def compose_run(
    line: CommandLine, check: Callable[[dict[str, Any]], Any]
) -> tuple[DictConfig, dict[str, Any], Path | None]:
    """Compose a command line; return it with Hydra's part, the plain configuration, and the folder that it resumes.

    Raises:
        ConfigError: the command line does not compose, or contradicts the run that it resumes.
    """
    try:
        cfg = compose_with_hydra(line)
    except NotComposedError as error:
        raise_with_others(error, check)
    plain = plain_part(cfg)
    resumed = folder_to_resume(plain)
    if resumed is not None:
        from llm.config.resume import RESOLVED_FROM_AUTO, merge_resumed, with_fitting_micro_batch

        with open_hydra(line) as loader:
            overrides = list(cfg.hydra.overrides.task)
            plain = merge_resumed(load(resumed / "config.yaml"), plain, overrides, partial(keys_set_by, loader=loader))
        found = RunFolder(resumed, is_writer=False).read_summary().get(RESOLVED_FROM_AUTO, {})
        plain = with_fitting_micro_batch(plain, found)
    return cfg, plain, resumed


def _place(cfg: DictConfig, resumed: Path | None, line: CommandLine, launch: Launch | None) -> None:
    """Set the folder of the run to that of the resumed run, or to one on which all ranks agree."""
    is_given = any(override.startswith("hydra.run.dir=") for override in line.overrides)
    folder = Path(cfg.hydra.run.dir)
    if resumed is not None:
        if is_given and folder.absolute() != resumed.absolute():
            raise ConfigError(f"hydra.run.dir={folder}: a resumed run stays in {resumed}; remove hydra.run.dir")
        folder = resumed
    if launch is not None:
        from llm.distributed.rendezvous import agree

        adopt(launch)
        folder = folder if is_given else Path(agree(str(folder), launch))
    with read_write(cfg.hydra):
        cfg.hydra.run.dir = str(folder).replace("${", "\\${")
        if launch is not None and launch.rank:  # rank 0 alone keeps Hydra's notes
            cfg.hydra.output_subdir = None
            cfg.hydra.job.name = f"{line.config_name}_rank{launch.rank}"


def _run_in_folder(cfg: DictConfig, line: CommandLine, work: Callable[[], float | None]) -> None:
    """Run `work` as Hydra runs a job, with its notes and log in the folder, its callbacks and its working directory."""
    folder = Path(cfg.hydra.run.dir).absolute()

    def job(_: DictConfig) -> float | None:
        print_own_lines()  # Hydra has configured the log by now
        try:
            return work()
        except SystemExit as error:  # Hydra's callbacks are called for exceptions alone
            raise CommandStoppedError(error.code if isinstance(error.code, int) else 1) from None

    callbacks = Callbacks(cfg)
    callbacks.on_run_start(config=cfg, config_name=line.config_name)
    with open_hydra(line) as loader:
        context = HydraContext(config_loader=loader, callbacks=callbacks)
        try:
            result = run_job(job, cfg, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context)
        except OSError as error:  # an error of `work` is part of the result
            reason = f"{error.strerror}: {error.filename}"
            raise ConfigError(f"hydra.run.dir: {reason}; choose a folder that you may write to") from error
    callbacks.on_run_end(config=cfg, config_name=line.config_name, job_return=result)
    failure = result._return_value if result.status is JobStatus.FAILED else None  # the property prints a line as well
    if failure is None or isinstance(failure, CrucibleError):
        discard_empty(folder)
    if failure is not None:
        raise failure


def _start_ranks(processes: int, folder: Path, *, is_resumed: bool) -> float | None:
    """Run this command once per device, all ranks in this run's folder; return the validation loss.

    Raises:
        CommandStoppedError: the ranks ended with another status than 0.
    """
    own = [f"hydra.run.dir={quote(str(folder))}", "hydra.output_subdir=null"]
    if is_resumed:
        own.append(f"resume={quote(str(folder))}")
    status = start_processes(
        [sys.executable, str(Path(sys.argv[0]).resolve()), *sys.argv[1:], *own], processes=processes
    )
    if status:
        discard_empty(folder)
        raise CommandStoppedError(status)
    return RunFolder(folder).read_summary().get("val/loss")
