"""The settings of a sweep: `sweep.KEY=VALUE` on the command line, over conf/sweep.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from llm.errors import ConfigError, did_you_mean
from llm.signatures import fits, type_name

PREFIX = "sweep."


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The keys of conf/sweep.yaml, which says what each does."""

    resume: str | None
    isolate: bool
    report: bool
    line_every: float


def split_options(arguments: Sequence[str], defaults: Path) -> tuple[SweepOptions, list[str]]:
    """Return the sweep's settings, and the arguments without them.

    Raises:
        ConfigError: an unknown key or a value of another type, all of them together.
    """
    values: dict[str, Any] = yaml.safe_load(defaults.read_text())
    hints = get_type_hints(SweepOptions)
    problems = []
    for argument in arguments:
        if not argument.startswith(PREFIX):
            continue
        key, _, text = argument.removeprefix(PREFIX).partition("=")
        value = text if key == "resume" and text not in ("null", "") else yaml.safe_load(text)
        values[key] = float(value) if hints.get(key) is float and isinstance(value, int) else value
        if key not in hints:
            problems.append(f"{PREFIX}{key}={text}: unknown key{did_you_mean(key, hints)}")
        elif not fits(values[key], hints[key]):
            problems.append(f"{PREFIX}{key}={text}: must be {type_name(hints[key])}; see conf/sweep.yaml")
    if not problems and not values["line_every"] > 0:
        problems.append(f"{PREFIX}line_every={values['line_every']}: must be above 0 seconds; try 30")
    if problems:
        raise ConfigError("\n".join(problems))
    options = SweepOptions(**{f.name: values[f.name] for f in fields(SweepOptions)})
    return options, [argument for argument in arguments if not argument.startswith(PREFIX)]
