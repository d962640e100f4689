"""Builds one piece, with its defaults from conf/, for anyone's model or training loop."""

import inspect
from collections.abc import Collection, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

from torch import nn

from llm.commands.in_process import composed_piece, keys_of_size
from llm.config.cross_checks import check_rates
from llm.config.piece_signature import keyword_parameters
from llm.config.pieces import instantiate, piece_at
from llm.config.signatures import MISSING, check_node, suggest, target_nodes
from llm.contracts import AttentionGeometry
from llm.errors import ConfigError
from llm.model.attention.attention_layer import Attention
from llm.model.decoder_checks import resolve_head_dim
from llm.optim.foreign_kinds import groups_of_any_module

GEOMETRY = ("d_model", "num_heads", "num_kv_heads", "head_dim")
"""Dimensions that an attention receives together."""

PARTS_OF_A_RUN = ("callbacks", "experiment", "logger", "model/size", "trainer")
"""Groups whose options are not one piece that works outside a run."""


def build(choice: str, /, *arguments: nn.Module | str, **settings: Any) -> Any:
    """Build one piece with its defaults from conf/: `llm.build("optimizer=muon", model, lr=3e-3)`.

    An optimizer takes any module and groups its parameters by kind; see `llm.optim.foreign_kinds`. It has no batch rule
    and no schedule. A function such as a schedule is returned with its settings bound. Weights of a module are drawn
    from torch's generator.

    Args:
        choice: `<group>=<option>`, an option of conf/.
        arguments: the model of an optimizer, and overrides such as "model.attention.codebook.codebook_size=64".
        settings: the piece's own settings, and the dimensions that its parent would pass. `kinds` of an optimizer names
            the kinds of parameters by pattern; `position` of an attention is a module or an option.

    Raises:
        ConfigError: an unknown group, option or setting, a missing dimension, or a value that the piece refuses.
    """
    group, equals, option = choice.partition("=")
    overrides = [argument for argument in arguments if isinstance(argument, str)]
    models = [argument for argument in arguments if isinstance(argument, nn.Module)]
    if not equals or not option:
        raise ConfigError(f"{choice}: not <group>=<option>; write for instance llm.build('optimizer=muon', model)")
    if group in PARTS_OF_A_RUN:
        raise ConfigError(f"{choice}: belongs to a run; use it in llm.compose({choice!r})")
    if len(models) + len(overrides) < len(arguments) or (len(models) != 1 if group == "optimizer" else models):
        needed = "needs one model" if group == "optimizer" else "takes no model"
        raise ConfigError(f"{choice}: {needed}; write llm.build('optimizer=muon', model, lr=3e-3)")
    if group == "optimizer":
        return _optimizer(choice, models[0], overrides, settings)
    if isinstance(settings.get("position"), str):
        overrides.append(f"model/position={settings.pop('position')}")
    return _piece(choice, overrides, settings)


def _optimizer(choice: str, model: nn.Module, overrides: list[str], settings: dict[str, Any]) -> Any:
    """Return an optimizer over the groups of a model's parameters."""
    kinds = settings.pop("kinds", None)
    node = _node(choice, overrides)
    _merge("optimizer", node, settings, others={"kinds"})
    _refuse_invalid("optimizer", node)
    check_rates(node)
    groups = groups_of_any_module(model, lr=node["lr"], weight_decay=node["weight_decay"], kinds=kinds)
    try:
        return instantiate(node)(groups)
    except ValueError as error:
        raise ConfigError(f"{choice}: {error}; see the docstring of {node['_target_']}") from error


def _piece(choice: str, overrides: list[str], settings: dict[str, Any]) -> Any:
    """Return a piece that is built from its settings and dimensions; None for an option without a piece."""
    key = choice.partition("=")[0].replace("/", ".")
    node = _node(choice, overrides)
    if "_target_" not in node:
        return None
    piece = piece_at(node["_target_"])
    parameters = keyword_parameters(piece)
    supplied: dict[str, Any] = {}
    if "geometry" in parameters:
        supplied = _of_an_attention(choice, piece, overrides, settings)
    for name in settings.keys() & parameters.keys() - node.keys() if node.get("_partial_") else ():
        supplied[name] = settings.pop(name)
    _merge(key, node, settings, others={*parameters, *(GEOMETRY if "geometry" in parameters else ())} - {"geometry"})
    missing = [name for name in node if node[name] == MISSING]
    required = [name for name, p in parameters.items() if p.default is p.empty and name not in {*node, *supplied}]
    if missing or (required and inspect.isclass(piece)):
        example = ", ".join(f"{name}=…" for name in (*missing, *required))
        raise ConfigError(f"{choice}: needs {', '.join((*missing, *required))}; write llm.build({choice!r}, {example})")
    _refuse_invalid(key, node)
    built = instantiate(node)
    if not node.get("_partial_"):
        return built
    return partial(built, **supplied) if required else built(**supplied)


def _of_an_attention(choice: str, piece: Any, overrides: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return geometry, position and layer index for an attention without a model."""
    if absent := [name for name in ("d_model", "num_heads") if name not in settings]:
        raise ConfigError(
            f"{choice}: needs {' and '.join(absent)}; write llm.build({choice!r}, d_model=256, num_heads=4)"
        )
    sizes = {name: settings.pop(name, None) for name in GEOMETRY}
    d_model, num_heads = sizes["d_model"], sizes["num_heads"]
    head_dim = resolve_head_dim(d_model=d_model, num_heads=num_heads, head_dim=sizes["head_dim"])
    geometry = AttentionGeometry(
        d_model=d_model, num_heads=num_heads, num_kv_heads=sizes["num_kv_heads"] or num_heads, head_dim=head_dim
    )
    position = settings.pop("position", None)
    if position is None:
        chosen = next((o for o in overrides if o.startswith("model/position=")), None)
        usual = "rerope" if issubclass(piece, Attention) and piece.needs_bare_keys else "rope"
        position = _piece(chosen or f"model/position={usual}", overrides, {"head_dim": head_dim})
    return {"geometry": geometry, "position": position, "layer_index": settings.pop("layer_index", 0)}


def _node(choice: str, overrides: list[str]) -> dict[str, Any]:
    """Return the node of an option with its defaults, without the keys that only the size of a model sets."""
    group, _, option = choice.partition("=")
    is_list = group == "eval"
    others = [override for override in overrides if override != choice]
    tree = composed_piece(f"{group}=[{option}]" if is_list else choice, others)
    node: Any = tree
    for part in [*group.split("/"), *([option] if is_list else [])]:
        node = node.get(part) if isinstance(node, Mapping) else None
    node, path = deepcopy(node or {}), group.replace("/", ".")
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    if group.startswith("model/") and "model/size" not in given:  # dimensions of another model are no default
        for name in [name for name in node if f"{path}.{name}" in keys_of_size() - given]:
            node[name] = MISSING
    return node


def _merge(path: str, node: dict[str, Any], settings: Mapping[str, Any], *, others: Collection[str] = ()) -> None:
    """Set settings in a node; a mapping changes the settings that it names."""
    known = {*node, *others} - {"_target_", "_partial_", "params"}
    unknown = [
        f"{name}={settings[name]!r}: unknown setting of {path}{suggest(name, known)}"
        for name in settings
        if name not in known
    ]
    if unknown:
        raise ConfigError("\n".join(unknown))
    for name, value in settings.items():
        if isinstance(value, Mapping) and isinstance(node.get(name), dict):
            _merge(f"{path}.{name}", node[name], value)
        else:
            node[name] = value


def _refuse_invalid(path: str, node: Mapping[str, Any]) -> None:
    """Raise ConfigError for keys and types that the piece does not have."""
    if problems := [problem for where, inner in target_nodes(node, path) for problem in check_node(where, inner)]:
        raise ConfigError("\n".join(problems))
