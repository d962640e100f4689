"""Parses a command line in Hydra's grammar: flags, overrides, and texts that may hold any character."""

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from llm.config.conf import conf_folder
from llm.config.quoting import quote
from llm.config.safety import secrets_on_the_command_line
from llm.errors import ConfigError

PATH_KEYS = frozenset(
    {"resume", "init_from", "run_dir", "checkpoint", "out", "hydra.run.dir", "hydra.sweep.dir", "sweep.resume"}
)
"""Keys that hold one path, which may have any character: what Hydra cannot read as a text is taken as it is."""

PATH_LIST_KEYS = frozenset({"data.files", "data.val_files", "data.path", "loader.cache_dir", "tokenizer.path"})
"""Keys that hold a path, or paths in brackets: a text that Hydra cannot read is taken as one path."""

MULTIRUN = ("-m", "--multirun")

HYDRA_FLAGS = ("cfg", "info", "hydra_help", "shell_completion", "experimental_rerun")
"""Flags that Hydra itself answers, without a run."""


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """One command line of train.py, eval.py or another command.

    Args:
        command: name of the script, `train` or `eval`, or of another command.
        config_name: the primary configuration, a file of `config_dir` or of a folder in the search path.
        config_dir: the folder of the groups, `conf/` unless `--config-path` names another.
        more_configs: a folder with further options and configurations, from `--config-dir`.
        overrides: `key=value` arguments, each in Hydra's grammar.
        flags: arguments that are no overrides, except `-m`.
        is_help: whether `--help` was given.
        is_multirun: whether `-m` was given.
        is_for_hydra: whether Hydra itself answers a flag, such as `--cfg job`, without a run.
    """

    command: str
    config_name: str
    config_dir: Path
    more_configs: Path | None = None
    overrides: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    is_help: bool = False
    is_multirun: bool = False
    is_for_hydra: bool = False

    def with_overrides(self, overrides: Iterable[str]) -> "CommandLine":
        """Return this command line with `overrides` in place of its own."""
        return replace(self, overrides=tuple(overrides))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --hydra-help lists the flags")


def parse_command_line(arguments: Sequence[str], command: str, config_dir: Path | None = None) -> CommandLine:
    """Return the command line that `arguments` spell.

    Args:
        arguments: as in sys.argv, without the script.
        command: name of the script and of its configuration, such as `train`.
        config_dir: the folder of the groups, None for `conf/`.

    Raises:
        ConfigError: secrets, unknown flags, or arguments that are no overrides; one line per mistake.
    """
    if secrets := secrets_on_the_command_line(arguments):
        raise ConfigError("\n".join(secrets))
    parser = get_args_parser()
    parser.__class__ = _Parser  # raises instead of printing its usage and exiting
    parser.allow_abbrev = False
    if complaints := [*_unknown_flags(arguments, parser), *_spaced(arguments)]:
        raise ConfigError("\n".join(complaints))
    given = parser.parse_intermixed_args(list(arguments))
    if given.package and not given.cfg:
        raise ConfigError(f"--package={given.package}: acts only with --cfg; add --cfg job")
    overrides = [as_text(override, is_multirun=given.multirun) for override in given.overrides]
    return CommandLine(
        command=command,
        config_name=given.config_name or command,
        config_dir=_folder("--config-path", given.config_path) if given.config_path else config_dir or conf_folder(),
        more_configs=_folder("--config-dir", given.config_dir) if given.config_dir else None,
        overrides=tuple(overrides),
        flags=tuple(_without(arguments, [*given.overrides, *MULTIRUN])),
        is_help=given.help,
        is_multirun=given.multirun or "hydra.mode=MULTIRUN" in overrides,
        is_for_hydra=any(vars(given)[name] not in (None, False) for name in HYDRA_FLAGS),
    )


def _without(arguments: Iterable[str], removed: Iterable[str]) -> list[str]:
    gone = set(removed)
    return [argument for argument in arguments if argument not in gone]


def as_text(override: str, *, is_multirun: bool = False) -> str:
    """Return an override with its value quoted where the key holds a path and Hydra cannot read the value as a text."""
    key, equals, value = override.partition("=")
    name = key.lstrip("+")
    if not equals or not value or name not in PATH_KEYS | PATH_LIST_KEYS:
        return override
    try:
        parsed = parse_override(override)
    except HydraException:
        return f"{key}={quote(value)}"
    if value != value.strip():  # Hydra removes spaces around a value
        is_text = True
    elif parsed.is_sweep_override():
        is_text = not is_multirun and (name in PATH_KEYS or Path(value).expanduser().exists())
    else:
        is_text = name in PATH_KEYS and isinstance(parsed.value(), int | float)
    return f"{key}={quote(value)}" if is_text else override


def parse_override(override: str) -> Override:
    """Return an override as Hydra reads it.

    Raises:
        HydraException: Hydra's grammar has no such override.
    """
    return OverridesParser.create().parse_override(override)


def unreadable(override: str) -> str:
    """Return the complaint about an override that Hydra cannot read, with the spelling that works."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: not key=value; write {override}=<value>, or add a dash for a flag, as in -m"
    quoted = f"{key}={quote(value)}"
    in_shell = f'"{quoted}"' if not re.search(r'["$`\\!]', quoted) else "'" + quoted.replace("'", "'\\''") + "'"
    return f"{override}: not key=value in Hydra's grammar; quote the value: {in_shell}"


def _unknown_flags(arguments: Sequence[str], parser: argparse.ArgumentParser) -> Iterator[str]:
    known = {option for action in parser._actions for option in action.option_strings}
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if argument.startswith("-") and name not in known:
            key = name.lstrip("-").replace("-", "_")
            yield f"{argument}: settings take no dashes; write {key}={value if equals else following or 'value'}"


def _spaced(arguments: Sequence[str]) -> Iterator[str]:
    """Yield a complaint for `key = value`, which the shell splits into three arguments."""
    for position, argument in enumerate(arguments):
        if argument == "=" and 0 < position < len(arguments) - 1:
            key, value = arguments[position - 1], arguments[position + 1]
            yield f"{key} = {value}: has spaces around the equals sign; write {key}={value}"


def _folder(flag: str, given: str) -> Path:
    folder = Path(given).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"{flag}={given}: no such folder; name one with a folder per group, as conf/ has them")
    return folder
