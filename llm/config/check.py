"""Validates a configuration before any data or model is built, and derives its sizes."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from llm.config.build import GROUPS
from llm.config.checked import CheckedConfig
from llm.config.cross_checks import check_across_groups
from llm.config.decided import decided_elsewhere
from llm.config.problems import Problem
from llm.config.run import RunConfig, run_config
from llm.config.safety import escaping_paths, secrets_in
from llm.config.signatures import check_node, check_pieces, fits, suggest, target_nodes, type_name
from llm.config.sizes import sizes_of
from llm.errors import ConfigError

SUPPLIED_TO = {"data.data_module.TokenDataModule": frozenset({"source"})}
"""Arguments that a parent passes to a node, by the node's `_target_`."""

MAX_SEED = 2**32
"""Seeds lie below this number, as NumPy's generators require."""

MISSING_RULE = "missing; every run needs it, so remove the override that deletes it"
"""Rule of a key that `~key` has removed."""

NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]+")
NAME_RULE = "may have only letters, digits, dots, dashes and underscores; try name=my-run"
"""Names of runs become names of folders."""


def check(cfg: Mapping[str, Any]) -> CheckedConfig:
    """Validate a plain configuration before any data or model is built, and return it with its sizes.

    Raises:
        ConfigError: one line per mistake, each with key, value, rule and remedy.
    """
    problems = key_problems(cfg)
    known = _without_unknown_keys(cfg, problems)
    invalid = {problem.group for problem in problems if not problem.is_unknown_key}
    if lines := [*problems, *check_across_groups(known, invalid=invalid)]:
        raise ConfigError("\n".join(lines))
    return CheckedConfig(tree=cfg, run=run_config(cfg), sizes=sizes_of(cfg))


def key_problems(cfg: Mapping[str, Any], groups: Iterable[str] = GROUPS) -> list[Problem]:
    """Return the mistakes that single keys have: unknown, missing and ill-typed ones, secrets and escaping paths.

    Args:
        cfg: a plain configuration.
        groups: groups whose nodes are checked; run-level keys are always checked.
    """
    problems = [*_check_run_keys(cfg), *secrets_in(cfg), *escaping_paths(cfg)]
    nodes = {group: cfg.get(group) for group in groups}
    trainer = nodes.get("trainer")
    if isinstance(trainer, Mapping) and "precision" not in trainer:
        problems.append(Problem("trainer.precision", MISSING_RULE))
    if isinstance(trainer, Mapping):  # `resolve_precision` checks it: Lightning does not know `auto`
        nodes["trainer"] = {key: value for key, value in trainer.items() if key != "precision"}
    problems += decided_elsewhere(nodes)
    problems += [_without_option(group, node) for group, node in nodes.items() if node and _lacks_option(group, node)]
    for group in {"callbacks", "logger", "eval"} & nodes.keys():
        problems += check_pieces(group, cfg.get(group))
    for path, node in target_nodes(nodes):
        problems += check_node(path, node, SUPPLIED_TO.get(str(node["_target_"]), frozenset()))
    return problems


def _lacks_option(group: str, node: Any) -> bool:
    """Return whether a group has settings and no option that reads them, as `+averaging.decay=0.9` alone."""
    is_piece = group not in {"callbacks", "logger", "eval"}  # these have one piece per name
    return is_piece and isinstance(node, Mapping) and bool(node) and "_target_" not in node


def _without_option(group: str, node: Mapping[str, Any]) -> Problem:
    key, value = next(iter(node.items()))
    return Problem(f"{group}.{key}", f"no option reads it; choose one first, as in {group}=<option>", value=value)


def _without_unknown_keys(cfg: Mapping[str, Any], problems: Iterable[Problem]) -> dict[str, Any]:
    """Return the configuration without the unknown keys, so that its other rules can be checked."""
    known = copy.deepcopy(dict(cfg))
    for problem in problems:
        *parents, key = problem.key.split(".")
        node: Any = known
        for parent in parents:
            node = node.get(parent) if isinstance(node, Mapping) else None
        if problem.is_unknown_key and isinstance(node, dict):
            node.pop(key, None)
    return known


def _check_run_keys(cfg: Mapping[str, Any]) -> list[Problem]:
    hints = get_type_hints(RunConfig)
    needed = [field.name for field in fields(RunConfig) if field.default is MISSING]
    problems = [Problem(key, MISSING_RULE) for key in needed if key not in cfg]
    if not cfg.get("loader"):
        problems.append(Problem("loader", MISSING_RULE))
    for key, value in cfg.items():
        if key not in hints and key not in GROUPS:
            rule = f"unknown key{suggest(str(key), {*hints, *GROUPS})}"
            problems.append(Problem(key, rule, value=value, is_unknown_key=True))
        elif key in hints and not fits(value, hints[key]):
            rule = f"must be {type_name(hints[key])}; got {type(value).__name__}"
            problems.append(Problem(key, rule, value=repr(value)))
    for key in ("val_every", "checkpoint_every"):
        if isinstance(cfg.get(key), int) and cfg[key] < 1:
            problems.append(Problem(key, "must be at least 1 update; try 100", value=cfg[key]))
    seed = cfg.get("seed")
    if isinstance(seed, int) and not 0 <= seed < MAX_SEED:
        rule = f"must lie in [0, {MAX_SEED}), the range of NumPy's generators; try 0"
        problems.append(Problem("seed", rule, value=seed))
    if not is_name(str(cfg.get("name"))):
        problems.append(Problem("name", NAME_RULE, value=cfg.get("name")))
    return problems


def is_name(name: str) -> bool:
    """Return whether a run name has letters, digits, dots, dashes and underscores alone, and no `..`."""
    return NAME_PATTERN.fullmatch(name) is not None and ".." not in name
