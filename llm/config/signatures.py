"""Compares configuration nodes with the signatures of what they name, before anything is built."""

import importlib
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from llm.config.piece_signature import Signature, signature_of
from llm.config.problems import Problem
from llm.config.source_signatures import IMPORTS_LIGHTNING, read_signature
from llm.errors import closest

ALLOWED_TARGETS = (
    "llm.adapt.",
    "llm.callbacks.",
    "llm.distributed.deepspeed_trainer.",
    "llm.evals.",
    "llm.model.",
    "llm.objective.",
    "llm.optim.",
    "llm.scaling.",
    "llm.training.spikes.",
    "data.hub.",
    "data.data_module.",
    "data.sources.",
    "data.synthetic.",
    "data.text_files.",
    "data.tokenizer.",
    "torch.optim.",
    "lightning.Trainer",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.strategies.",
)
"""Packages and modules that hold pieces, the only ones that `_target_` may name: configuration is data, not code."""

DEFINED_IN = ("llm.", "data.", "torch.optim.", "lightning.pytorch.")
"""Prefixes of the module that must define the piece itself.

Without this rule, `llm.callbacks.progress.sys.exit` would pass by its name although no piece of ours defines it.
"""

HYDRA_KEYS = {
    "_target_": str,
    "_partial_": bool,
    "_recursive_": bool,
    "_convert_": Literal["none", "partial", "object", "all"],
    "_args_": list,
}
"""Keys that Hydra defines for every node, with the types of their values."""

SYNONYMS = {
    "learning_rate": "lr", "wd": "weight_decay", "n_embd": "d_model", "dim": "d_model", "hidden_size": "d_model",
    "n_layer": "num_layers", "n_layers": "num_layers", "n_head": "num_heads", "n_heads": "num_heads",
    "block_size": "context_length", "seq_len": "context_length", "batch_size": "batch_tokens", "steps": "max_steps",
    "path": "files", "optim": "optimizer", "tokens": "max_tokens", "d_ff": "ffn.d_ff",
    "run_dir": "hydra.run.dir", "output_dir": "hydra.run.dir", "out_dir": "hydra.run.dir",
}  # fmt: skip
"""Names of other projects, each with the name of the same setting here."""

MISSING = "???"


def target_nodes(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (dotted path, node) for every mapping under `node` that has a `_target_`."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from target_nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for i, value in enumerate(node):
            yield from target_nodes(value, f"{path}[{i}]")


def is_allowed(target: Any) -> bool:
    """Return whether a `_target_` is on the allow-list. The name alone decides: nothing is imported."""
    if not isinstance(target, str) or not target.startswith(ALLOWED_TARGETS):
        return False
    return not any(part.startswith("_") for part in target.split("."))


def locate(target: str) -> Any:
    """Import what a `_target_` names.

    Raises:
        ImportError, AttributeError: nothing has this name.
    """
    module_name, _, attribute = target.rpartition(".")
    parts = module_name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name and not ".".join(parts[:cut]).startswith(error.name):
                raise
            continue
        for name in [*parts[cut:], attribute]:
            found = getattr(found, name)
        return found
    raise ImportError(target)


def check_node(path: str, node: Mapping[str, Any], supplied: frozenset[str] = frozenset()) -> list[Problem]:
    """Return the mistakes in one `_target_` node: its target, and unknown, missing and ill-typed keys.

    Args:
        path: dotted path of the node, for messages.
        node: plain mapping.
        supplied: arguments that the parent passes when it calls a factory.
    """
    target = node["_target_"]
    if not is_allowed(target):
        allowed = " ".join(f"{prefix}*" if prefix.endswith(".") else prefix for prefix in ALLOWED_TARGETS)
        return [Problem(f"{path}._target_", f"not on the allow-list; use one of {allowed}", value=target)]
    try:
        signature = signature_at(target)
    except (ImportError, AttributeError) as error:
        return [Problem(f"{path}._target_", f"cannot be imported ({error}); check the spelling", value=target)]
    if signature is None or not signature.module.startswith(DEFINED_IN):
        rule = "not defined in its module, which only imports it; name a piece that the module defines"
        return [Problem(f"{path}._target_", rule, value=target)]
    return [*_check_keys(path, node, signature), *_check_missing(path, node, signature, supplied)]


def signature_at(target: str) -> Signature | None:
    """Return the signature of what a `_target_` names, read from its source where its module imports Lightning.

    None where it names nothing that can be called.

    Raises:
        ImportError, AttributeError: nothing has this name.
    """
    read = read_signature(target) if target.startswith(IMPORTS_LIGHTNING) else None
    if read is not None:
        return read
    function = locate(target)
    return signature_of(function) if callable(function) else None


def check_pieces(group: str, pieces: Any) -> list[Problem]:
    """Return the mistakes in a group of named nodes: entries that are neither a node nor null."""
    if not isinstance(pieces, Mapping) or "_target_" in pieces:
        return []
    return [
        Problem(f"{group}.{name}", f"must be a mapping with a _target_, as in conf/{group}; or null", value=repr(piece))
        for name, piece in pieces.items()
        if piece is not None and not (isinstance(piece, Mapping) and "_target_" in piece)
    ]


def _check_keys(path: str, node: Mapping[str, Any], signature: Signature) -> list[Problem]:
    known, open_ended, hints = signature.parameters, signature.is_open_ended, {**signature.hints, **HYDRA_KEYS}
    problems = []
    for key, value in node.items():
        if key not in known and key not in HYDRA_KEYS:
            if not open_ended:
                rule = f"unknown key{suggest(str(key), known)}"
                problems.append(Problem(f"{path}.{key}", rule, value=value, is_unknown_key=True))
        elif value == MISSING:
            rule = f"a value is needed; add {path}.{key}=… to the command"
            problems.append(Problem(f"{path}.{key}", rule, value=MISSING))
        elif not fits(value, hints.get(key, Any)):
            rule = f"must be {type_name(hints[key])}; got {type(value).__name__}"
            problems.append(Problem(f"{path}.{key}", rule, value=repr(value)))
    return problems


def _check_missing(path: str, node: Mapping[str, Any], signature: Signature, supplied: frozenset[str]) -> list[Problem]:
    if node.get("_partial_", False) is not False:
        return []
    required = {n for n, p in signature.parameters.items() if p.default is p.empty}
    absent = sorted(required - set(node) - supplied)
    return [Problem(f"{path}.{name}", f"missing; {node['_target_']} needs it") for name in absent]


def suggest(key: str, known: Collection[str]) -> str:
    """Return a `did you mean` hint for a key, or the list of known keys where none is close."""
    meant = meant_key(key, known)
    return f"; did you mean {meant}?" if meant else f"; known keys: {', '.join(sorted(known))}"


def meant_key(key: str, known: Collection[str]) -> str | None:
    """Return the known key that `key` means by synonym or by closeness, None without one."""
    synonym = SYNONYMS.get(key)
    if synonym and synonym.split(".")[0] in {*known, "hydra"}:
        return synonym
    return closest(key, known)


def fits(value: Any, hint: Any) -> bool:
    """Return whether a plain configuration value has the type `hint`. Unknown hints accept any value."""
    if hint is Any or (isinstance(value, Mapping) and "_target_" in value):  # a nested node is checked on its own
        return True
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, a) for a in arguments)
    if origin is Literal:
        return value in arguments
    if hint is type(None):
        return value is None
    if hint in (int, float, bool, str):
        return _fits_scalar(value, hint)
    if hint is Path:
        return isinstance(value, str | Path)
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if origin is tuple and ... not in arguments:
        return is_list and len(value) == len(arguments) and all(map(fits, value, arguments))
    if hint in (list, tuple) or origin in (list, tuple, Sequence):
        return is_list
    return not (value is None and origin is dict)


def _fits_scalar(value: Any, hint: type) -> bool:
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if hint is float else hint)


def type_name(hint: Any) -> str:
    """Return a hint in words: `int`, `one of linear | sqrt`, `int or null`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments)
    if origin is tuple and ... not in arguments:
        return f"[{', '.join(map(type_name, arguments))}]"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
