"""Composes a configuration from conf/ and the overrides of a command line."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from llm.commands.arguments import CommandLine, parse_override
from llm.commands.config_groups import unnamed_options
from llm.commands.diagnosis import Diagnosis, diagnose
from llm.config.conf import conf_folder
from llm.config.files import to_plain
from llm.errors import ConfigError

Checked = TypeVar("Checked")
"""What a check of a configuration returns."""

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)
"""Errors that Hydra and OmegaConf raise for a command line that does not compose."""


def eval_folder(run_dir: str | list[str] | None, checkpoint: str) -> str:
    """Return the folder of an evaluation: inside its run, or next to the runs where several are compared."""
    if run_dir is None:
        return str(Path(checkpoint).resolve().parent.parent / "eval")
    if isinstance(run_dir, str):
        return f"{run_dir}/eval"
    return f"comparisons/{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"


OmegaConf.register_new_resolver("eval_folder", eval_folder, replace=True, use_cache=True)


@contextlib.contextmanager
def open_hydra(line: CommandLine) -> Iterator[ConfigLoader]:
    """Initialize Hydra on the folder of a command line; restore its former state at the end."""
    with initialize_config_dir(str(line.config_dir), version_base="1.3"):  # restores the former state
        search_path = create_config_search_path(str(line.config_dir))
        if line.more_configs is not None:
            search_path.prepend("command-line", f"file://{line.more_configs}", SearchPathQuery(provider="schema"))
        GlobalHydra.instance().clear()
        yield Hydra.create_main_hydra2(line.command, search_path).config_loader


def compose_with_hydra(line: CommandLine) -> DictConfig:
    """Return the configuration that a command line composes to, with Hydra's own part under `hydra`.

    Raises:
        NotComposedError: it does not compose, or lacks a group that a run needs.
    """
    with open_hydra(line) as loader:
        try:
            given = [parse_override(override) for override in line.overrides]
            if any(unnamed_options(given, loader)):
                raise NotComposedError(diagnose(line, loader, None))
            cfg = compose(line.config_name, overrides=list(line.overrides), return_hydra_config=True)
        except COMPOSITION_ERRORS as error:
            raise NotComposedError(diagnose(line, loader, error)) from error
    with open_dict(cfg):
        cfg.hydra.mode = RunMode.RUN
    HydraConfig.instance().set_config(cfg)
    return cfg


class NotComposedError(ConfigError):
    """A command line that does not compose.

    Args:
        diagnosis: its mistakes, and the configuration of the other overrides.
    """

    def __init__(self, diagnosis: Diagnosis) -> None:
        super().__init__("\n".join(diagnosis.problems))
        self.remaining = diagnosis.remaining


def plain_part(cfg: DictConfig) -> dict[str, Any]:
    """Return a composed configuration without Hydra's own part, resolved, as plain dicts and lists.

    Raises:
        ConfigError: an interpolation does not resolve.
    """
    task = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    try:
        return to_plain(task)
    except OmegaConfBaseException as error:
        key = error.full_key or "configuration"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}; correct the interpolation") from error


def compose_checked(line: CommandLine, check: Callable[[dict[str, Any]], Checked]) -> Checked:
    """Compose a command line and return what `check` makes of it.

    Raises:
        ConfigError: all mistakes of both, one line each.
    """
    try:
        cfg = compose_with_hydra(line)
    except NotComposedError as error:
        raise_with_others(error, check)
    return check(plain_part(cfg))


def raise_with_others(error: NotComposedError, check: Callable[[dict[str, Any]], Any]) -> NoReturn:
    """Raise an error of composition together with the mistakes that `check` finds in the remaining configuration."""
    lines = str(error).splitlines()
    remaining = error.remaining()
    if remaining is not None:
        try:
            check(remaining)
        except ConfigError as further:
            lines += [line for line in str(further).splitlines() if line not in lines]
    raise ConfigError("\n".join(lines)) from error


def compose_plain(config_name: str, overrides: Iterable[str]) -> dict[str, Any]:
    """Return the plain configuration that overrides of `conf/<config_name>.yaml` compose to.

    Raises:
        NotComposedError: they do not compose. The message has one line per mistake.
    """
    line = CommandLine(
        command=config_name, config_name=config_name, config_dir=conf_folder(), overrides=tuple(overrides)
    )
    return plain_part(compose_with_hydra(line))
