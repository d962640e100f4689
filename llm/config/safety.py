"""Refuses secrets, which would be saved with the configuration, and paths that lead out of the run folder."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from llm.config.problems import Problem

SECRET_KEY = re.compile(
    r"(^|[_-])(key|auth|passphrase|credentials?|tokens?)$|secret|password|passwd|api_?key|(access|auth|api|bearer)_?token",
    re.IGNORECASE,
)
PLAIN_KEYS = re.compile(
    r"^(bos|eos|pad|unk|mask|cls|sep)_token$"
    r"|(^|_)(batch|max|max_new|val|train|base_batch|min|num|new|seen|wanted|prompt|total|chunk|capacity)_tokens?$"
)
"""Keys that end in `token` or `tokens` and count or name tokens of a text."""

NUMBERS = re.compile(r"[\d_.,eE+\s\[\]-]+")
"""Values of counts of tokens, whose keys have many names. A secret called `tokens` does not consist of digits."""

SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
SHORTEST_SECRET = 8
"""Number of characters below which the value of a variable may equal an ordinary setting by chance."""

URL_USER = re.compile(r"://[^/@\s:]+:[^/@\s]+@")
PATH_KEYS = frozenset({"filename", "dirpath", "save_dir", "root_dir", "log_dir", "default_root_dir", "dump_dir"})
REMEDY = "secrets do not belong in a configuration, which is saved; set an environment variable, or log in"


def is_secret_key(key: str) -> bool:
    """Return whether a key names a secret, as `api_key` does; a count such as `batch_tokens` does not."""
    last = key.rsplit(".", 1)[-1]
    return bool(SECRET_KEY.search(last)) and not PLAIN_KEYS.search(last)


def secrets_in(config: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> list[Problem]:
    """Return a complaint for each value that must not be saved; the value itself is never shown.

    Such values are those whose key names a secret, URLs with a password, and values that equal a secret of the
    environment, for example through `${oc.env:…}`.

    Args:
        config: plain configuration.
        environment: variables; None for this process's own.
    """
    variables = os.environ if environment is None else environment
    held = {v: n for n, v in variables.items() if SECRET_VARIABLE.search(n) and len(v) >= SHORTEST_SECRET}
    problems = []
    for path, key, value in _leaves(config):
        if not isinstance(value, str) or not value or value == "???":
            continue
        if is_secret_key(key):
            problems.append(Problem(path, REMEDY, value="…"))
        elif value in held:
            problems.append(Problem(path, f"is the value of ${held[value]}; {REMEDY}", value="…"))
        elif URL_USER.search(value):
            problems.append(Problem(path, f"a URL with a password in it; {REMEDY}", value="…"))
    return problems


def secrets_on_the_command_line(arguments: Iterable[str]) -> list[str]:
    """Return a complaint for each override that names a secret, before the command line is logged."""
    problems = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        name = key.lstrip("+~-")
        asked = re.search(r"oc\.env:\s*([A-Za-z_0-9]+)", value)
        is_count = name.endswith("tokens") and NUMBERS.fullmatch(value)
        if value not in ("", "null") and not is_count and is_secret_key(name.replace("-", "_")):
            problems.append(f"{name}=…: {REMEDY}")
        elif asked and (SECRET_VARIABLE.search(asked[1].upper()) or is_secret_key(asked[1].lower())):
            problems.append(f"{name}=${{oc.env:{asked[1]}}}: {REMEDY}")
        elif URL_USER.search(value):
            problems.append(f"{name}=…: a URL with a password in it; {REMEDY}")
    return problems


def escaping_paths(config: Mapping[str, Any]) -> list[Problem]:
    """Return a complaint for each file name of a logger, callback or trainer that could lead out of the run folder."""
    problems = []
    for path, key, value in _leaves({g: config.get(g) for g in ("callbacks", "logger", "trainer")}):
        if key in PATH_KEYS and isinstance(value, str):
            name = PurePath(value)
            if name.is_absolute() or ".." in name.parts or value.startswith("~"):
                rule = "leads out of the run folder; give a name inside it, without .."
                problems.append(Problem(path, rule, value=value))
    return problems


def _leaves(node: Any, path: str = "", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted path, nearest key, value) of everything that is no container."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _leaves(value, f"{path}.{name}" if path else str(name), str(name))
    elif isinstance(node, Sequence) and not isinstance(node, str | bytes):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}[{index}]", key)
    else:
        yield path, key, node


def redact(value: Any) -> Any:
    """Return `value` with every secret in it replaced: by key (`api_key`, `hf_token`, ...) and in URLs' user part.

    A count such as `batch_tokens` is no secret, nor is anything that is not a text.
    """
    if isinstance(value, Mapping):
        return {
            key: "<redacted>" if isinstance(inner, str) and inner and is_secret_key(str(key)) else redact(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return re.sub(r"(://)[^/@\s]+@", r"\1<redacted>@", value) if isinstance(value, str) else value
