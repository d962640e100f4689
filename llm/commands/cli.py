"""The command line of train.py, eval.py and the other commands: help, one line per mistake, and exit statuses."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from llm.commands.arguments import CommandLine, parse_command_line
from llm.commands.compose import COMPOSITION_ERRORS, Checked, compose_plain, plain_part
from llm.commands.help import help_page
from llm.commands.hydra_job import run_once
from llm.commands.signals import CommandStoppedError
from llm.config.conf import conf_folder
from llm.distributed.launch import find_launch, note_failure
from llm.errors import ConfigError, CrucibleError
from llm.sweep.follow import follow_parent

EXIT_MISTAKE = 2
"""Exit status of a mistake that the user can correct."""


def run_command(
    task: Callable[[Checked, Path], float | None],
    *,
    config_name: str,
    check: Callable[[dict[str, Any]], Checked],
    sweeps: bool = False,
) -> None:
    """Compose the configuration from sys.argv, check it, and call `task(checked configuration, run folder)`.

    Exit status: 0 finished, 2 a mistake to correct, 128 + n stopped by signal n, 1 anything else.

    Args:
        task: the work of the command.
        config_name: the primary configuration, a file of conf/.
        check: validates the plain configuration before any folder is made, and returns what `task` receives.
        sweeps: whether `-m` starts a sweep with a manifest and a report. Otherwise Hydra runs the jobs in turn.
    """
    follow_parent()
    with reported_mistakes():
        line = parse_command_line(sys.argv[1:], config_name)
        if line.is_help:
            sys.stdout.write(help_page(line.config_dir, config_name))
        elif line.is_for_hydra or (line.is_multirun and not sweeps):
            _leave_to_hydra(line, task, check)
        elif line.is_multirun:
            from llm.commands.multirun import run_sweep  # with a report, which imports SciPy

            sys.exit(run_sweep(line, task=task, check=check) or None)
        else:
            run_once(line, task=task, check=check)


def run_plain_command(
    task: Callable[[dict[str, Any]], Any], *, config_name: str, raw: frozenset[str] = frozenset()
) -> None:
    """Compose the configuration from sys.argv and call `task(plain configuration)`, without a folder, log or sweep.

    Exit status: 0 finished, 2 a mistake to correct, 1 anything else.

    Args:
        task: the work of the command.
        config_name: the configuration, a file of conf/.
        raw: keys whose values are texts that are taken as they are, whatever commas and brackets they have.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    arguments = sys.argv[1:]
    with reported_mistakes():
        texts = dict(argument.split("=", 1) for argument in arguments if argument.split("=")[0] in raw)
        line = parse_command_line([a for a in arguments if a.split("=")[0] not in texts], config_name)
        if line.is_help:
            sys.stdout.write((conf_folder() / f"{config_name}.yaml").read_text())
        elif line.is_multirun or line.flags:
            raise ConfigError(f"{' '.join(line.flags) or '-m'}: this command runs once and takes key=value alone")
        else:
            task(compose_plain(config_name, line.overrides) | texts)


@contextlib.contextmanager
def reported_mistakes() -> Iterator[None]:
    """Print each mistake that a user can correct as one line and exit with status 2. Exit silently after a signal."""
    try:
        yield
    except CrucibleError as error:
        note_failure(error)
        launch = find_launch()
        if launch is None or launch.rank == 0:  # the same mistake on another rank is printed once
            lines = str(error).splitlines()
            sys.stderr.write("".join(f"{line}\n" if line.startswith(" ") else f"error: {line}\n" for line in lines))
        sys.exit(EXIT_MISTAKE)
    except CommandStoppedError as stopped:
        sys.exit(stopped.status)
    except Exception as error:
        note_failure(error)
        raise


def _leave_to_hydra(line: CommandLine, task: Callable[[Any, Path], float | None], check: Callable[..., Any]) -> None:
    """Let Hydra answer a flag such as `--cfg job`, or run the jobs of an evaluation in turn."""

    def job(cfg: DictConfig) -> float | None:
        return task(check(plain_part(cfg)), Path(HydraConfig.get().runtime.output_dir))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing its own page
    sys.argv[1:] = [*line.overrides, *line.flags, *(["-m"] if line.is_multirun else [])]
    main = hydra.main(version_base="1.3", config_path=str(line.config_dir), config_name=line.config_name)
    try:
        main(job)()
    except COMPOSITION_ERRORS as error:
        raise ConfigError(str(error).strip()) from error
