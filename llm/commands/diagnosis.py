"""Finds every mistake in a command line that does not compose, each as one line with a remedy."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra import compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm.commands.arguments import CommandLine, parse_override, unreadable
from llm.commands.config_groups import all_groups, group_options, is_group, options_with, unnamed_options
from llm.commands.suggestions import unknown_key
from llm.config.files import to_plain
from llm.errors import did_you_mean

PLUGIN_GROUPS = ("hydra/launcher", "hydra/sweeper")
"""Groups whose options come with plugins of Hydra."""

PLUGINS = "; pip install -e '.[sweep]' brings joblib, submitit_slurm and optuna"


@dataclass
class Diagnosis:
    """The mistakes in a command line, and the configuration that the remaining overrides compose to.

    Args:
        problems: one line per mistake.
        config: the configuration of the other overrides; None if they do not compose, or if there are none.
    """

    problems: list[str] = field(default_factory=list)
    config: DictConfig | None = None

    def remaining(self) -> dict[str, Any] | None:
        """Return the plain configuration without the mistakes, for further checks; None where there is none.

        Resolving it imports the optimizer, whose family some values follow from.
        """
        if self.config is None:
            return None
        HydraConfig.instance().set_config(self.config)  # `${hydra:...}` reads it
        with contextlib.suppress(OmegaConfBaseException):
            return to_plain(OmegaConf.masked_copy(self.config, [str(k) for k in self.config if k != "hydra"]))
        return None


def diagnose(line: CommandLine, loader: ConfigLoader, error: Exception | None) -> Diagnosis:
    """Return the mistakes of a command line.

    The chosen options are composed first, so that keys are compared with those of the chosen options.

    Args:
        line: the command line.
        loader: Hydra's loader for it.
        error: the error of its composition, which is reported where nothing more specific is found; None if it composes
            but lacks a group that a run needs.
    """
    found = Diagnosis()
    readable = list(_readable(line, found))
    unnamed = list(unnamed_options(readable, loader))
    found.problems += [problem for _, problem in unnamed]
    overrides = [o for o in readable if not any(o is other for other, _ in unnamed)]
    choices = [o for o in overrides if is_group(o.key_or_group, loader)]
    chosen = list(_existing_options(choices, loader, found))
    chosen = list(_applicable(line, chosen, loader, found))
    config = _compose(line, chosen)
    if config is None:
        found.problems += [] if error is None else [_own_words(error)]
        return found
    values = [o for o in overrides if o not in choices and not _belongs_to(o, choices, chosen)]
    values = list(_known_keys(values, config, loader, found))
    rest = [*chosen, *map(_text, values)]
    if set(rest) & set(line.overrides):  # otherwise every override is a mistake, and the defaults are valid
        found.config = _compose(line, rest)
    if not found.problems and error is not None:
        found.problems.append(_own_words(error))
    return found


def _own_words(error: Exception) -> str:
    """Return an error of Hydra's without the lines that describe its internals."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = " ".join(str(cause).split())
    key = cause.full_key if isinstance(cause, OmegaConfBaseException) else None
    return f"{key}: {text.partition(' full_key:')[0]}; correct the value" if key else text


def _readable(line: CommandLine, found: Diagnosis) -> Iterator[Override]:
    """Yield the overrides that Hydra can read, those that sweep over values at their first value."""
    for text in line.overrides:
        try:
            override = parse_override(text)
        except HydraException:
            found.problems.append(unreadable(text))
            continue
        if override.is_sweep_override() and not line.is_multirun:
            key, _, value = text.partition("=")
            remedy = f"several values need -m, and a list needs brackets: '{key}=[{value}]'"
            found.problems.append(f"{text}: {remedy}")
            if override.is_discrete_sweep():
                yield parse_override(f"{key}={next(override.sweep_string_iterator())}")
            continue
        yield override


def _existing_options(choices: Iterable[Override], loader: ConfigLoader, found: Diagnosis) -> Iterator[str]:
    """Yield the choices as overrides; an option that does not exist is replaced by the closest one, or skipped."""
    for override in choices:
        value = override.value() if not override.is_delete() else None
        names = [str(name) for name in value] if isinstance(value, list) else [str(value)]
        options = group_options(override.key_or_group, loader)
        meant = list(names)
        for position, name in enumerate(names):
            if value is None or name in options:
                continue
            near = did_you_mean(name, options)
            plugins = PLUGINS if override.key_or_group in PLUGIN_GROUPS else ""
            remedy = f"choose one of {', '.join(options)}{plugins}"
            found.problems.append(f"{override.key_or_group}={name}: no such option{near}; {remedy}")
            meant[position] = near.removeprefix("; did you mean ").removesuffix("?")
        if meant == names:
            yield _text(override)
        elif all(meant):
            value = f"[{','.join(meant)}]" if isinstance(value, list) else meant[0]
            yield f"{override.get_key_element()}={value}"


def _applicable(line: CommandLine, chosen: list[str], loader: ConfigLoader, found: Diagnosis) -> Iterator[str]:
    """Yield the choices that fit into the defaults list; others name a group that the chosen options lack."""
    if _compose(line, chosen) is not None:
        yield from chosen
        return
    good: list[str] = []
    for choice in chosen:
        if _compose(line, [*good, choice]) is not None:
            good.append(choice)
            continue
        group = choice.lstrip("+~").partition("=")[0].partition("@")[0]
        having = options_with(group, loader)
        remedy = f"unknown key; only {' and '.join(having)} has it" if having else "does not compose here"
        if choice.startswith("+"):
            remedy = f"already chosen; write {choice.lstrip('+')}"
        found.problems.append(f"{group}: {remedy}")
    yield from good


def _known_keys(
    values: Iterable[Override], config: DictConfig, loader: ConfigLoader, found: Diagnosis
) -> Iterator[Override]:
    """Yield the overrides whose keys the chosen options have, or that add a key."""
    tree: Any = OmegaConf.to_container(config, resolve=False)
    for override in values:
        key = override.key_or_group
        known: Any = tree
        has_key = True
        for part in key.replace("/", ".").split("."):
            has_key = has_key and isinstance(known, Mapping) and part in known
            known = known[part] if has_key else None
        if override.is_add():
            if has_key and not override.is_force_add():
                found.problems.append(f"+{key}: exists already; write {key}={override.get_value_string()}")
            else:
                yield override
        elif has_key and "/" not in key:
            yield override
        else:
            unknown = unknown_key(key, tree, all_groups(loader) if "/" in key else ())
            found.problems.append(unknown.problem)
            if (
                unknown.meant is not None and not override.is_delete()
            ):  # otherwise a missing value would be reported as well
                yield parse_override(f"{unknown.meant}={override.get_value_string()}")


def _belongs_to(override: Override, choices: Iterable[Override], chosen: Iterable[str]) -> bool:
    """Return whether an override sets a key of an option that does not exist, whose keys are unknown therefore."""
    kept = {choice.lstrip("+~").partition("=")[0] for choice in chosen}
    missing = [c.key_or_group.replace("/", ".") for c in choices if c.get_key_element().lstrip("+~") not in kept]
    return any(override.key_or_group.startswith(f"{group}.") for group in missing)


def _compose(line: CommandLine, overrides: Iterable[str]) -> DictConfig | None:
    try:
        return compose(line.config_name, overrides=list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException):
        return None


def _text(override: Override) -> str:
    return str(override.input_line)
