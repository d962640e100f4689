"""Finds the settings of a sweep that every job would refuse, before the first job starts."""

from collections.abc import Callable, Iterable
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from llm.commands.compose import compose_plain
from llm.errors import ConfigError
from llm.sweep.manifest import SweepJob

MAX_LISTED = 8
"""Problems in one error message."""


def refuse_if_all_jobs_fail(
    jobs: Iterable[SweepJob], *, check: Callable[[dict[str, Any]], Any], config_name: str
) -> None:
    """Raise where the check refuses each job. Stop at the first valid job, so that a valid sweep starts at once.

    A sweep in which only some jobs are refused runs: those jobs fail alone, with their reason in the manifest.

    Raises:
        ConfigError: every job is refused. The message has the problems that all jobs share, or else all problems.
    """
    found: list[list[str]] = []
    for job in jobs:
        try:
            check(compose_plain(config_name, list(job.overrides)))
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            found.append(str(error).splitlines())
        else:
            return
    if not found:
        return
    shared = [line for line in found[0] if all(line in lines for lines in found)]
    problems = shared or list(dict.fromkeys(line for lines in found for line in lines))
    if len(problems) > MAX_LISTED:
        problems = [*problems[:MAX_LISTED], f"and {len(problems) - MAX_LISTED} more problems; every job is refused"]
    raise ConfigError("\n".join(problems))
