"""Settings that all jobs of a sweep share."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llm.sweep.prune import Pruning


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """Settings that all jobs of a sweep share.

    Args:
        sweep: the sweep's folder.
        command: the command of a plain run: the interpreter, the script and Hydra's flags.
        owner: process number of the sweep. A job ends when that process ends.
        side_by_side: jobs that run at the same time on this machine.
        threads: CPU threads per job, None to leave the environment as it is.
        devices: GPUs that jobs share out among them. Where it is empty, each job sees all GPUs.
        environment: environment variables of each job.
        swept: keys that differ between jobs.
        raises: whether a failed job raises, which some sweepers need. Otherwise its value is NaN.
        started: time of the sweep's start, in seconds since 1970.
        prune: the rule that ends jobs early, None for no rule.
    """

    sweep: Path
    command: tuple[str, ...]
    owner: int
    side_by_side: int = 1
    threads: int | None = None
    devices: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    swept: tuple[str, ...] = ()
    raises: bool = False
    started: float = field(default_factory=time.time)
    prune: Pruning | None = None


def plain_command(script: Path, flags: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the command that starts a plain run of `script` with this interpreter."""
    return (sys.executable, str(script), *flags)
