"""Checks a sweep before it starts: Hydra's settings, the swept keys, and the jobs where they are known."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from llm.commands.arguments import CommandLine
from llm.commands.compose import COMPOSITION_ERRORS, NotComposedError, compose_with_hydra, open_hydra, plain_part
from llm.commands.config_groups import group_options
from llm.commands.diagnosis import diagnose
from llm.config.check import NAME_RULE, is_name
from llm.errors import ConfigError
from llm.sweep.manifest import SweepJob

MAX_LISTED = 8
"""Problems in one error message."""

MAX_SAMPLES = 8
"""Samples of a search that are checked before its first job; the first valid one ends the check."""

OF_THE_SWEEP = ("hydra.sweep", "hydra.mode", "hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.run.dir")
"""Beginnings of the keys under `hydra` that concern the sweep and not its jobs."""


@dataclass(frozen=True)
class Ahead:
    """What is known about a sweep before it starts.

    Args:
        hydra: Hydra's own settings, unresolved except for the sweep's folder.
        swept: keys that are swept.
        jobs: the jobs where Hydra's own sweeper makes them; other sweepers choose theirs as results arrive.
        samples: jobs with values from the ends and the middle of each searched range, where a sweeper chooses its jobs.
        for_jobs: overrides under `hydra` that each job needs as well, such as `hydra.job.chdir`.
    """

    hydra: Any
    swept: tuple[str, ...]
    jobs: tuple[SweepJob, ...]
    samples: tuple[SweepJob, ...]
    for_jobs: tuple[str, ...]

    @property
    def is_basic(self) -> bool:
        """Whether the jobs are the product of the given values, known in advance."""
        return self.hydra.runtime.choices["hydra/sweeper"] == "basic"


def look_ahead(line: CommandLine) -> Ahead:
    """Compose with the first value of each swept key, and list the jobs where Hydra's own sweeper makes them.

    Each other option of a swept group is composed as well, so that a mistake in one is found before any job starts.

    Raises:
        ConfigError: the command line does not compose, or a run name is invalid.
    """
    with open_hydra(line) as loader:
        parser = OverridesParser.create(config_loader=loader)
        try:
            given = parser.parse_overrides(list(line.overrides))
        except HydraException as error:
            raise NotComposedError(diagnose(replace(line, is_multirun=True), loader, error)) from error
        composed = _compose(line.with_overrides(_first(o) for o in given), loader)
        HydraConfig.instance().set_config(composed)
        settings = OmegaConf.create(OmegaConf.to_container(composed.hydra, resolve=False))
        settings.sweep.dir = composed.hydra.sweep.dir
        params = composed.hydra.sweeper.get("params") or {}
        added = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
        for overrides in _other_options([*added, *given], loader):
            _compose(line.with_overrides(overrides), loader)
    everything = [o for o in [*added, *given] if not o.is_hydra_override()]
    _check_names(everything)
    jobs, samples = (), ()
    if settings.runtime.choices["hydra/sweeper"] == "basic":
        (batch,) = BasicSweeper.split_arguments(everything, None)
        jobs = tuple(SweepJob(overrides=tuple(job)) for job in batch)
    elif not settings.sweeper.get("custom_search_space"):  # such a function chooses keys as well
        samples = tuple(_samples(everything))
    return Ahead(
        hydra=settings,
        swept=tuple(o.get_key_element().lstrip("+~") for o in everything if o.is_sweep_override()),
        jobs=jobs,
        samples=samples,
        for_jobs=tuple(str(o.input_line) for o in given if o.is_hydra_override() and not _is_of_the_sweep(o)),
    )


def _compose(line: CommandLine, loader: ConfigLoader) -> DictConfig:
    try:
        return compose(line.config_name, overrides=list(line.overrides), return_hydra_config=True)
    except COMPOSITION_ERRORS as error:
        raise NotComposedError(diagnose(line, loader, error)) from error


def refuse_if_all_jobs_fail(
    jobs: Sequence[SweepJob], line: CommandLine, check: Callable[[dict[str, Any]], Any], *, are_samples: bool = False
) -> None:
    """Raise where the check refuses each job. Stop at the first valid job, so that a valid sweep starts at once.

    A sweep in which only some jobs are refused runs: those jobs fail alone, with their reason in the manifest.

    Args:
        jobs: the jobs of the sweep.
        line: the command line that all jobs share.
        check: raises ConfigError for a configuration that it refuses.
        are_samples: whether the sweep may choose further jobs. A problem that not all samples share is then ignored.

    Raises:
        ConfigError: every job is refused. The message has the problems that all jobs share, or else all problems.
    """
    found: list[list[str]] = []
    for job in jobs:
        try:
            check(plain_part(compose_with_hydra(line.with_overrides([*line.overrides, *job.overrides]))))
        except ConfigError as error:
            found.append(str(error).splitlines())
        else:
            return
    shared = [problem for problem in found[0] if all(problem in problems for problems in found)] if found else []
    if not found or (are_samples and not shared):
        return
    problems = shared or list(dict.fromkeys(problem for problems in found for problem in problems))
    if len(problems) > MAX_LISTED:
        problems = [*problems[:MAX_LISTED], f"and {len(problems) - MAX_LISTED} more problems; every job is refused"]
    raise ConfigError("\n".join(problems))


def _is_of_the_sweep(override: Override) -> bool:
    return override.key_or_group.startswith(OF_THE_SWEEP)


def _check_names(overrides: Sequence[Override]) -> None:
    """Refuse run names that could lead out of the sweep's folder, since Hydra creates the folders of jobs."""
    for override in overrides:
        if override.key_or_group == "name":
            is_sweep = override.is_discrete_sweep()
            names = list(override.sweep_string_iterator()) if is_sweep else [str(override.value())]
            if wrong := [name for name in names if not is_name(name.strip("'\""))]:
                raise ConfigError(f"name={wrong[0]}: {NAME_RULE}")


def _other_options(given: Sequence[Override], loader: ConfigLoader) -> Iterator[list[str]]:
    """Yield the overrides with each further option of each swept group. Other swept keys keep their first value."""
    first = [_first(override) for override in given]
    for number, override in enumerate(given):
        if override.is_discrete_sweep() and group_options(override.key_or_group, loader):
            for value in [*override.sweep_string_iterator()][1:]:
                yield [*first[:number], f"{override.get_key_element()}={value}", *first[number + 1 :]]


def _samples(given: Sequence[Override]) -> Iterator[SweepJob]:
    """Yield jobs that together take each end and the middle of each range, and each of the given values."""
    values = [_values(override) for override in given]
    for number in range(min(MAX_SAMPLES, max(map(len, values), default=0))):
        yield SweepJob(overrides=tuple(of_key[number % len(of_key)] for of_key in values))


def _values(override: Override) -> list[str]:
    """Return an override with each value that a sample takes."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if override.is_discrete_sweep():
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    interval = override.value()
    assert isinstance(interval, IntervalSweep)
    assert interval.start is not None
    assert interval.end is not None
    kind = int if isinstance(interval.start, int) and isinstance(interval.end, int) else float
    middle = kind((interval.start + interval.end) / 2)
    return [f"{override.get_key_element()}={value}" for value in (interval.start, middle, interval.end)]


def _first(override: Override) -> str:
    """Return an override with the first of the values that it sweeps over."""
    return _values(override)[0]
