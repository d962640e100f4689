"""Reads the settings of a sweep: `sweep.KEY=VALUE` on the command line, with defaults from conf/sweep.yaml."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from llm.config.signatures import fits, type_name
from llm.errors import ConfigError, did_you_mean
from llm.sweep.prune import Pruning

PREFIX = "sweep."
"""Prefix of a sweep's settings on the command line."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The keys of conf/sweep.yaml, which documents them, and the set of keys that were `given`."""

    resume: str | None
    isolate: bool
    report: bool
    line_every: float
    prune: Literal["median", "halving"] | None
    prune_after: float
    prune_factor: int
    prune_others: int
    given: frozenset[str]

    def pruning(self, kept: Mapping[str, Any] | None) -> Pruning | None:
        """Return the rule that ends jobs early: the one given, else the one that a resumed sweep `kept`.

        Raises:
            ConfigError: all jobs share one process, so that a single job cannot be ended.
        """
        rule = Pruning(**kept) if kept else None
        if any(key.startswith("prune") for key in self.given):
            settings = {"after": self.prune_after, "factor": self.prune_factor, "others": self.prune_others}
            rule = None if self.prune is None else Pruning(rule=self.prune, **settings)
        if rule is not None and not self.isolate:
            raise ConfigError(
                f"{PREFIX}prune={rule.rule}: ends a job's process, and with sweep.isolate=false all jobs share one; "
                "remove sweep.isolate=false, or set sweep.prune=null"
            )
        return rule


def split_options(arguments: Sequence[str], defaults: Path) -> tuple[SweepOptions, list[str]]:
    """Return the sweep's settings and the other arguments.

    Raises:
        ConfigError: a key is unknown or a value invalid. The error lists all of them.
    """
    values: dict[str, Any] = yaml.safe_load(defaults.read_text())
    hints = get_type_hints(SweepOptions)
    del hints["given"]
    given, problems = set(), []
    for argument in arguments:
        if not argument.startswith(PREFIX):
            continue
        key, _, text = argument.removeprefix(PREFIX).partition("=")
        given.add(key)
        value = text if key == "resume" and text not in ("null", "") else yaml.safe_load(text)
        values[key] = float(value) if hints.get(key) is float and isinstance(value, int) else value
        if key not in hints:
            problems.append(f"{PREFIX}{key}={text}: unknown key{did_you_mean(key, hints)}")
        elif not fits(values[key], hints[key]):
            problems.append(f"{PREFIX}{key}={text}: must be {type_name(hints[key])}; see conf/sweep.yaml")
    if problems := problems or [f"{PREFIX}{problem}" for problem in _out_of_range(values, given)]:
        raise ConfigError("\n".join(problems))
    options = SweepOptions(**{key: values[key] for key in hints}, given=frozenset(given))
    return options, [argument for argument in arguments if not argument.startswith(PREFIX)]


def _out_of_range(values: Mapping[str, Any], given: set[str]) -> Iterator[str]:
    after, factor, others = values["prune_after"], values["prune_factor"], values["prune_others"]
    if not values["line_every"] > 0:
        yield f"line_every={values['line_every']}: must be above 0 seconds; try 30"
    if not 0 < after < 1:
        yield f"prune_after={after}: must be between 0 and 1, a share of a job's updates; try 0.25"
    if factor < 2:
        yield f"prune_factor={factor}: must be at least 2; try 2 or 4"
    if others < 1:
        yield f"prune_others={others}: must be at least 1; try 3"
    own = {None: set(), "median": {"prune_after", "prune_others"}}.get(values["prune"], given)
    for key in sorted(key for key in given - own if key.startswith("prune_")):
        rules = "halving" if key == "prune_factor" else "median or sweep.prune=halving"
        yield f"{key}={values[key]}: acts only with sweep.prune={rules}; add that, or remove this"
