"""The command line that train.py and eval.py share: help, mistakes in one line each, exit statuses."""

import logging
import os
import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm.commands.compose import CONFIG_DIR, compose_plain, default_config, value_of
from llm.commands.help import help_page
from llm.commands.multirun import is_multirun, run_sweep
from llm.commands.overrides import as_if_meant, diagnose, keys_set_by, not_overrides
from llm.config.check import check_name
from llm.config.files import load, to_plain
from llm.config.quoting import quote
from llm.config.resume import merge_resumed
from llm.config.sizes import world_size
from llm.distributed.launch import Launch, adopt, find_launch, note_failure, start_processes
from llm.distributed.rendezvous import agree
from llm.errors import ConfigError, CrucibleError
from llm.run_folder.checkpoint_files import list_checkpoints
from llm.run_folder.folder import RunFolder
from llm.run_folder.ownership import HYDRA_NOTES, discard_empty, remember_contents
from llm.sweep.follow import follow_parent

EXIT_MISTAKE = 2
"""Exit status of a mistake that the user can mend."""

log = logging.getLogger(__name__)


def eval_folder(run_dir: str | list[str] | None, checkpoint: str) -> str:
    """Return where an evaluation is written: into its run, or where several runs are compared, beside the runs."""
    if run_dir is None:
        return str(Path(checkpoint).resolve().parent.parent / "eval")
    if isinstance(run_dir, str):
        return f"{run_dir}/eval"
    return f"comparisons/{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"


OmegaConf.register_new_resolver("eval_folder", eval_folder, replace=True, use_cache=True)


def run_command(
    task: Callable[[dict[str, Any], Path], float | None],
    *,
    config_name: str,
    check: Callable[[dict[str, Any]], Any],
    sweeps: bool = False,
) -> None:
    """Compose the configuration from sys.argv and call `task(plain configuration, run folder)`.

    `check` sees the configuration first, before any folder is made. With `sweeps`, `-m` runs each job apart from the
    others, keeps a manifest and ends in a report; without, it is Hydra's own.

    Exit status: 0 finished, 2 a mistake to mend, 128 + n stopped by signal n, 1 anything else.
    """
    follow_parent()
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(help_page(CONFIG_DIR, config_name))
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors on instead of printing its own page
    stopped: list[int] = []
    mistakes: list[CrucibleError] = []
    started: list[bool] = []

    def job(cfg: DictConfig) -> float | None:
        started.append(True)
        try:
            return _run_job(task, cfg, stopped)
        except CrucibleError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            mistakes.append(error)  # raised below, past Hydra's own report of it
            discard_empty(Path(HydraConfig.get().runtime.output_dir))
            note_failure(error)
            return None
        except Exception as error:
            note_failure(error)
            raise

    try:
        if complaints := not_overrides(arguments, CONFIG_DIR):
            raise ConfigError("\n".join(complaints))
        _check_names(arguments)
        if sweeps and is_multirun(arguments):
            status = run_sweep(arguments, task=task, config_name=config_name, config_dir=CONFIG_DIR, check=check)
            sys.exit(status or None)
        resume_dir = _resume_dir(arguments, config_name)
        launch = find_launch()
        if launch is not None:
            resume_dir += _as_one_of_several(launch, [*arguments, *resume_dir], config_name)
        elif not resume_dir and not {"-m", "--multirun"} & set(arguments):
            _check_all([a for a in arguments if not a.startswith("-")], config_name, check)
            if HydraConfig.get().output_subdir is not None:  # a new run, not an evaluation inside a run folder
                RunFolder(HydraConfig.get().run.dir, is_writer=False).check_free(*HYDRA_NOTES)
        sys.argv[1:] = [*arguments, *resume_dir]
        remember_contents(_output_folder(sys.argv[1:]))
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(job)()
        if mistakes:
            raise mistakes[0]
    except CrucibleError as error:
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _fail(diagnose(error, default_config(config_name), CONFIG_DIR))
    except OSError as error:
        if started:
            raise
        _fail(f"hydra.run.dir: {error.strerror}: {error.filename}; choose a folder that you may write to")
    if stopped:
        sys.exit(stopped[0])


def run_plain_command(
    task: Callable[[dict[str, Any]], Any], *, config_name: str, raw: frozenset[str] = frozenset()
) -> None:
    """Compose the configuration from sys.argv and call `task(plain configuration)`: no folder, no log, no sweep.

    Values of the keys in `raw` are texts that are taken as they stand, whatever commas and brackets are in them.

    Exit status: 0 finished, 2 a mistake to mend, 1 anything else.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write((CONFIG_DIR / f"{config_name}.yaml").read_text())
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        if complaints := not_overrides(arguments, CONFIG_DIR):
            raise ConfigError("\n".join(complaints))
        texts = dict(argument.split("=", 1) for argument in arguments if argument.split("=")[0] in raw)
        task(compose_plain(config_name, [a for a in arguments if a.split("=")[0] not in texts]) | texts)
    except CrucibleError as error:
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _fail(diagnose(error, default_config(config_name), CONFIG_DIR))


def _check_all(overrides: list[str], config_name: str, check: Callable[[dict[str, Any]], Any]) -> None:
    """Check what the overrides compose to; those that do not compose are told together with what else is wrong."""
    problems = []
    while True:
        try:
            cfg = compose_plain(config_name, overrides)
            break
        except (HydraException, OmegaConfBaseException) as error:
            complaint = diagnose(error, default_config(config_name), CONFIG_DIR)
            rest = as_if_meant(overrides, complaint)
            if rest == overrides:
                raise ConfigError("\n".join([*problems, complaint])) from error
            problems, overrides = [*problems, complaint], rest
    try:
        check(cfg)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def _run_job(task: Callable[[dict[str, Any], Path], float | None], cfg: DictConfig, stopped: list[int]) -> Any:
    hydra_cfg = HydraConfig.get()
    plain = to_plain(cfg)
    if plain.get("resume"):
        saved = load(Path(hydra_cfg.runtime.output_dir) / "config.yaml")
        given: list[str] = OmegaConf.to_container(hydra_cfg.overrides.task)  # type: ignore[assignment]
        plain = merge_resumed(saved, plain, given, partial(keys_set_by, config_dir=CONFIG_DIR))
    folder = Path(hydra_cfg.runtime.output_dir)
    try:
        if find_launch() is None and "trainer" in plain and (processes := world_size(plain["trainer"])) > 1:
            return _start_ranks(processes, folder, stopped)
        answer = task(plain, folder)
        discard_empty(folder)
        return answer
    except SystemExit as error:  # a signal: leave the sweep too, with its status
        stopped.append(int(error.code or 0))
        if hydra_cfg.mode == RunMode.MULTIRUN:
            raise
        return None


def _start_ranks(processes: int, folder: Path, stopped: list[int]) -> float | None:
    """Run this command once a device, all in this run's folder; return the validation loss."""
    own = [f"hydra.run.dir={quote(str(folder))}", "hydra.output_subdir=null"]
    status = start_processes(
        [sys.executable, str(Path(sys.argv[0]).resolve()), *sys.argv[1:], *own], processes=processes
    )
    discard_empty(folder)
    if status:
        stopped.append(status)
        return None
    return RunFolder(folder).read_summary().get("val/loss")


def _as_one_of_several(launch: Launch, arguments: list[str], config_name: str) -> list[str]:
    """Return the overrides that put all ranks into the first one's folder, where that one alone takes Hydra's notes."""
    adopt(launch)
    own = [] if launch.rank == 0 else ["hydra.output_subdir=null", f"hydra.job.name={config_name}_rank{launch.rank}"]
    if any(a.startswith("hydra.run.dir=") for a in arguments):
        return own
    compose_plain(config_name, [a for a in arguments if not a.startswith("-")])
    folder = agree(str(HydraConfig.get().run.dir), launch)
    return [f"hydra.run.dir={quote(folder)}", *own]


def _output_folder(arguments: list[str]) -> Path:
    """Return the folder that Hydra will write to, or one with the same parent where its name has a time stamp."""
    is_multirun = bool({"-m", "--multirun"} & set(arguments))
    given = value_of("hydra.sweep.dir" if is_multirun else "hydra.run.dir", arguments)
    if given is None:
        given = "multirun/new" if is_multirun else str(HydraConfig.get().run.dir)
    return Path(given)


def _check_names(arguments: list[str]) -> None:
    """Refuse run names that could leave the folder of runs, also in a sweep."""
    for name in [n for a in arguments if a.startswith("name=") for n in a.removeprefix("name=").split(",")]:
        check_name(name)


def _resume_dir(arguments: list[str], config_name: str) -> list[str]:
    """Return the override that puts a resumed run back into its own folder."""
    given = value_of("resume", arguments)
    if given in (None, "", "null"):
        return []
    folder = _newest_run(arguments, config_name) if given == "auto" else Path(given)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"resume={folder}: holds no config.yaml; name a run folder, such as runs/<folder>")
    return [f"hydra.run.dir={quote(str(folder))}"]


def _newest_run(arguments: list[str], config_name: str) -> Path:
    """Return the newest run folder under runs/ whose config.yaml has this command line's name and a checkpoint."""
    name = compose_plain(config_name, [a for a in arguments if not a.startswith("-")])["name"]
    for file in sorted(Path("runs").glob("*/config.yaml"), reverse=True):
        if not file.parent.name.endswith(f"_{name}") or load(file).get("name") != name:
            continue
        if list_checkpoints(file.parent / "checkpoints"):
            return file.parent
        sys.stderr.write(f"resume=auto: skipped {file.parent}, which ended before its first checkpoint\n")
    raise ConfigError(f"resume=auto: no run named {name} with a checkpoint under runs/; name its folder instead")


def _fail(message: str) -> None:
    launch = find_launch()
    if launch is not None and launch.rank:  # the first rank says it, or the process that started them
        sys.exit(EXIT_MISTAKE)
    lines = message.splitlines()
    sys.stderr.write("".join(f"{line}\n" if line.startswith(" ") else f"error: {line}\n" for line in lines))
    sys.exit(EXIT_MISTAKE)
