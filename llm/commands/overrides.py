"""Says what is wrong with a command line: Hydra's complaint in, one line with a remedy out."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from llm.config.safety import secrets_on_the_command_line
from llm.config.signatures import suggest
from llm.errors import did_you_mean

PLUGIN_GROUPS = ("hydra/launcher", "hydra/sweeper")
"""Groups whose options come with plugins of Hydra's."""

NEEDED_GROUPS = ("model", "optimizer", "schedule", "scaling", "tokenizer", "data", "trainer", "callbacks")
"""Groups that a run cannot do without."""


def diagnose(error: Exception, config: Mapping[str, Any], config_dir: Path) -> str:
    """Return what a composition error means, as `<key>=<value>: <rule broken>; <what to do>`.

    Args:
        error: what Hydra raised while composing.
        config: the default configuration, whose keys are the known ones.
        config_dir: whose folders are the groups.
    """
    missing = getattr(error, "missing_cfg_file", None)
    if missing:
        group, _, option = str(missing).rpartition("/")
        there = (file.stem for file in (config_dir / group).glob("*.yaml"))
        options = sorted(getattr(error, "options", None) or there)  # of a list's entry Hydra names none
        plugins = "; pip install -e '.[sweep]' brings joblib, submitit_slurm and optuna"
        remedy = f"choose one of {', '.join(options)}{plugins if group in PLUGIN_GROUPS else ''}"
        return f"{group}={option}: no such option{did_you_mean(option, options)}; {remedy}"
    key = getattr(error.__cause__, "full_key", None)
    if key:
        return f"{key}: unknown key{suggest_key(str(key), config, config_dir)}"
    if group := re.match(r"Could not override '([^'@]+)", str(error)):
        with_it = _options_with(group[1], config_dir)
        has_it = f"; only {' and '.join(with_it)} has it" if with_it else suggest_key(group[1], config, config_dir)
        return f"{group[1]}: unknown key{has_it}"
    override = getattr(error, "override", None)
    if override:
        return f"{override}: not key=value; quote values with spaces or brackets, as in 'key=[1,2]'"
    return str(error).strip()


def as_if_meant(overrides: list[str], complaint: str) -> list[str]:
    """Return the overrides with the option that a complaint takes for meant, or without those that it is about.

    What belongs to an option that was not found is left out with it: nobody knows its keys.
    """
    several = re.match(r"Ambiguous value for argument '(.+)'", complaint)
    at_fault = several[1] if several else complaint.split(":")[0]
    meant = re.search(r"; did you mean (\S+)\?", complaint)
    key, _, option = at_fault.partition("=")
    if option and meant:
        return [o.replace(at_fault, f"{key}={meant[1]}") if o.lstrip("+") == at_fault else o for o in overrides]
    dotted = key.replace("/", ".")
    names = {o: o.lstrip("+~").split("=")[0].split("@")[0] for o in overrides}
    return [
        o
        for o in overrides
        if not (o == at_fault or names[o] in (key, dotted) or names[o].replace("/", ".").startswith(f"{dotted}."))
    ]


def suggest_key(key: str, config: Mapping[str, Any], config_dir: Path) -> str:
    """Return a `did you mean` hint for a key that the configuration lacks."""
    if "/" in key:
        return did_you_mean(key, _groups(config_dir))
    *parents, last = key.split(".")
    node: Any = config
    for depth, parent in enumerate(parents):
        if not isinstance(node, Mapping) or parent not in node:
            near = suggest(parent, _names(node))
            return near if depth == 0 and near.startswith("; did") else f" ({'.'.join(parents[: depth + 1])}){near}"
        node = node[parent]
    return suggest(last, _names(node))


def not_overrides(arguments: Iterable[str], config_dir: Path) -> list[str]:
    """Return complaints about arguments that must not be composed.

    Those are secrets, which Hydra would write down, and what it does not take: the `--key value` manner, and a group
    that gets null, a number or a truth value in place of an option's name, or that is left out though a run needs it.
    """
    arguments = list(arguments)
    if secrets := secrets_on_the_command_line(arguments):
        return secrets
    flags = {"-m", "--multirun", "-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-p", "--package"}
    flags |= {"--resolve", "--info", "-i", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
    complaints = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name = argument.split("=")[0]
        if argument.startswith("-") and name not in flags and not name.startswith("--experimental"):
            key = name.lstrip("-").replace("-", "_")
            value = argument.split("=", 1)[1] if "=" in argument else following or "value"
            complaints.append(f"{argument}: settings take no dashes; write {key}={value}")
    return [*complaints, *_no_options(arguments, config_dir)]


def _no_options(arguments: Iterable[str], config_dir: Path) -> Iterator[str]:
    for argument in arguments:
        key, _, text = argument.lstrip("+~").partition("=")
        group, is_deleted = key.split("@")[0], argument.startswith("~")
        if not (config_dir / group).is_dir():
            continue
        is_no_name = not is_deleted and any(map(_is_no_name, text.strip("[]").split(",") if text != "[]" else []))
        options = f"choose one of {', '.join(sorted(file.stem for file in (config_dir / group).glob('*.yaml')))}"
        if (group in NEEDED_GROUPS or "/" in group) and (is_deleted or is_no_name or text == "[]"):
            yield f"{argument}: {group} cannot be left out; {options}"
        elif is_no_name:
            yield f"{argument}: names no option; {options}, or write {group}=[] for none"


def _is_no_name(text: str) -> bool:
    """Whether Hydra reads a text as null, a truth value or a number."""
    try:
        float(text)
    except ValueError:
        return text.lower() in ("null", "true", "false")
    return True


def _groups(config_dir: Path) -> list[str]:
    return [p.relative_to(config_dir).as_posix() for p in config_dir.rglob("*") if p.is_dir()]


def _options_with(group: str, config_dir: Path) -> list[str]:
    """Return the options, as overrides, that bring a group along with them: model/ffn=moe for model/ffn/router."""
    parent, _, name = group.rpartition("/")
    found = []
    for file in sorted((config_dir / parent).glob("*.yaml")) if parent else ():
        entries = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("defaults", [])
        if any(isinstance(entry, dict) and name in entry for entry in entries):
            found.append(f"{parent}={file.stem}")
    return found


def _names(node: Any) -> list[str]:
    return [str(key) for key in node] if isinstance(node, Mapping) else []


def keys_set_by(group: str, option: str, config_dir: Path) -> list[str]:
    """Return the dotted keys that `group=option` sets: those of its file, where they land, and groups it overrides."""
    path = config_dir / group / f"{option}.yaml"
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    package = re.match(r"#\s*@package\s+(\S+)", text)
    at = package[1] if package else group.replace("/", ".")
    content = yaml.safe_load(text) or {}
    entries = [entry for entry in content.pop("defaults", []) if isinstance(entry, dict)]
    chosen = [key.removeprefix("override ").lstrip("/").replace("/", ".") for entry in entries for key in entry]
    return [*chosen, *_leaf_keys(content, "" if at == "_global_" else at)]


def _leaf_keys(node: Any, at: str) -> Iterator[str]:
    if isinstance(node, Mapping) and node and "_target_" not in node:
        for key, value in node.items():
            yield from _leaf_keys(value, f"{at}.{key}" if at else str(key))
    else:
        yield at
