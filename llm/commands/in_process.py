"""Composes and checks a run inside a Python session, and leaves Hydra's global state as it was."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf, read_write

from llm.commands.arguments import CommandLine, parse_command_line
from llm.commands.compose import compose_checked, compose_with_hydra, open_hydra, plain_part
from llm.commands.config_groups import group_options, keys_set_by, options_with
from llm.commands.evaluate import EvalConfig, check_eval
from llm.commands.hydra_job import compose_run
from llm.config.check import check
from llm.config.checked import CheckedConfig
from llm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ComposedRun:
    """A run that composes and passes every check.

    Args:
        line: its overrides, as a command line.
        hydra_config: the composed configuration with Hydra's own part.
        checked: the configuration for training.
        resumed: the folder of the run that it resumes, None for a new run.
    """

    line: CommandLine
    hydra_config: DictConfig
    checked: CheckedConfig
    resumed: Path | None

    def new_folder(self) -> Path:
        """Return the folder of the run: that of the resumed run, or the one that `hydra.run.dir` names at this time."""
        if self.resumed is not None:
            return self.resumed.absolute()
        with hydra_restored():
            OmegaConf.clear_cache(self.hydra_config)  # `${now:...}` gives the present time again
            HydraConfig.instance().set_config(self.hydra_config)
            return Path(self.hydra_config.hydra.run.dir).absolute()

    def write_notes(self, folder: Path) -> None:
        """Write the notes that Hydra writes into the folder of a run, from which reports read the chosen options."""
        cfg = self.hydra_config
        with read_write(cfg.hydra):
            cfg.hydra.runtime.output_dir = str(folder).replace("${", "\\${")
        keys = [str(key) for key in cfg if key != "hydra"]
        notes = {"config": OmegaConf.masked_copy(cfg, keys), "hydra": OmegaConf.create({"hydra": cfg.hydra})}
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        for name, note in {**notes, "overrides": cfg.hydra.overrides.task}.items():
            OmegaConf.save(note, folder / ".hydra" / f"{name}.yaml")


@contextlib.contextmanager
def hydra_restored() -> Iterator[None]:
    """Start without Hydra's global state, which a program of the user's may need, and restore it at the end."""
    own, config, version = GlobalHydra.instance(), HydraConfig.instance(), VersionBase.instance()
    state = own.hydra, config.cfg, version.version_base
    own.hydra = None
    try:
        yield
    finally:
        own.hydra, config.cfg, version.version_base = state


def composed_run(overrides: Sequence[str]) -> ComposedRun:
    """Return the run that overrides of `conf/train.yaml` describe.

    Raises:
        ConfigError: every mistake that the command line would report, one line each.
    """
    line = _line(overrides, "train")
    with hydra_restored():
        cfg, plain, resumed = compose_run(line, check)
        return ComposedRun(line=line, hydra_config=cfg, checked=check(plain), resumed=resumed)


def composed_evaluation(overrides: Sequence[str]) -> EvalConfig:
    """Return the evaluation that overrides of `conf/eval.yaml` describe.

    Raises:
        ConfigError: every mistake that the command line would report, one line each.
    """
    with hydra_restored():
        return compose_checked(_line(overrides, "eval"), check_eval)


def composed_defaults(config_name: str) -> dict[str, Any]:
    """Return the plain defaults of a configuration of `conf/`."""
    with hydra_restored():
        return plain_part(compose_with_hydra(_line([], config_name)))


def composed_piece(choice: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return `conf/train.yaml` composed with one option and overrides.

    An option of a group that the defaults lack is composed with the first option that contains its group:
    `model/ffn/router=softmax` with `model/ffn=moe`.

    Raises:
        ConfigError: the group, the option or a key does not exist.
    """
    line, group = _line([choice, *overrides], "train"), choice.partition("=")[0]
    with hydra_restored():
        if group not in _default_groups():
            with open_hydra(line) as loader:
                line = line.with_overrides([*options_with(group, loader)[:1], *line.overrides])
        return plain_part(compose_with_hydra(line))


@cache
def _default_groups() -> frozenset[str]:
    """Return the groups that the defaults list of `conf/train.yaml` has, also through the options that it chooses."""
    return frozenset(str(group) for group in compose_with_hydra(_line([], "train")).hydra.runtime.choices)


@cache
def keys_of_size() -> frozenset[str]:
    """Return the dotted keys that only the size of a model sets, such as `model.ffn.d_ff`."""
    with hydra_restored(), open_hydra(_line([], "train")) as loader:
        sizes = group_options("model/size", loader)
        return frozenset(key for size in sizes for key in keys_set_by("model/size", size, loader))


def _line(overrides: Sequence[str], config_name: str) -> CommandLine:
    line = parse_command_line(overrides, config_name)
    if line.is_multirun or line.is_help or line.is_for_hydra:
        raise ConfigError(f"{' '.join(overrides)}: composes one run; use `python train.py` for sweeps and for help")
    return line
