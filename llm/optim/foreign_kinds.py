"""Kinds of the parameters of any torch module, also of modules that declare none."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple, cast

from torch import nn

from llm.contracts import KindedModule, ParameterKind, ParamGroup
from llm.errors import ConfigError, closest
from llm.optim.param_groups import DEFAULT_KINDS, KINDS, build_param_groups

HEAD_NAMES = frozenset({"head", "lm_head", "output", "output_layer", "classifier", "score", "unembed", "embed_out"})
"""Usual names of the projection from hidden states to scores of tokens or classes."""

PRECEDENCE: tuple[ParameterKind, ...] = ("embedding", "head", "matrix", "vector")
"""Kinds in order of precedence, for a tensor that several modules share."""


class _Use(NamedTuple):
    kind: ParameterKind
    decays: bool


def groups_of_any_module(
    model: nn.Module, *, lr: float, weight_decay: float, kinds: Mapping[str, str] | None = None
) -> list[ParamGroup]:
    """Sort the trainable parameters of any module into tagged groups.

    A module of this project states its kinds, and those of torch's Linear, Embedding and norms are known. Elsewhere the
    shape decides: two dimensions are a matrix, or an embedding if the name says so; others are updated elementwise. A
    Linear is the head if its name says so, or if its outputs are as many as the tokens of an Embedding. Matrices and
    weights with more than two dimensions, such as those of convolutions, decay.

    Args:
        model: the module; its frozen parameters are excluded.
        lr: peak learning rate.
        weight_decay: decoupled weight decay.
        kinds: kinds by name or pattern, such as `{"*.pos_embed": "embedding"}`, which take precedence.

    Raises:
        ConfigError: an unknown kind, a pattern that fits no parameter, or nothing to train.
    """
    stated = _checked(model, kinds or {})
    uses = _uses(model, stated)
    return build_param_groups(
        model,
        lr=lr,
        weight_decay=weight_decay,
        kinds={name: use.kind for name, use in uses.items()},
        rates={name: (lr, weight_decay if use.decays else 0.0) for name, use in uses.items()},
    )


def _checked(model: nn.Module, stated: Mapping[str, str]) -> dict[str, ParameterKind]:
    """Return the stated kinds, each of which exists and fits a parameter."""
    found: dict[str, ParameterKind] = {}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern, stated_kind in stated.items():
        if stated_kind not in KINDS:
            raise ConfigError(f"kinds[{pattern!r}]={stated_kind}: no such kind; use one of {', '.join(KINDS)}")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"kinds[{pattern!r}]: fits no parameter; try {closest(pattern, names) or names[0]}")
        found[pattern] = cast(ParameterKind, stated_kind)
    return found


def _uses(model: nn.Module, stated: dict[str, ParameterKind]) -> dict[str, _Use]:
    """Return the kind of each trainable tensor, under its first name, and whether it decays."""
    vocabularies = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    names: dict[int, str] = {}
    found: dict[str, list[_Use]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            first = names.setdefault(id(parameter), name)
            found.setdefault(first, []).append(_use(model, name, parameter, vocabularies, stated))
    return {name: min(uses, key=lambda use: PRECEDENCE.index(use.kind)) for name, uses in found.items()}


def _use(
    model: nn.Module, name: str, parameter: nn.Parameter, vocabularies: set[int], stated: dict[str, ParameterKind]
) -> _Use:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    kind: ParameterKind | None = None
    for pattern in reversed(stated):  # the first that fits wins
        if fnmatchcase(name, pattern):
            kind = stated[pattern]
    if kind is None and isinstance(module, KindedModule):
        kind = module.parameter_kinds.get(leaf)
    if kind is None:
        for torch_type in (torch_type for torch_type in DEFAULT_KINDS if isinstance(module, torch_type)):
            kind = DEFAULT_KINDS[torch_type].get(leaf)
        if kind == "matrix" and _is_head(module, path, vocabularies):
            kind = "head"
    if kind is None:
        kind = _kind_by_shape(name, parameter)
        return _Use(kind, decays=kind == "matrix" or (parameter.ndim > 2 and not _is_embedding(name)))
    return _Use(kind, decays=kind == "matrix")


def _is_head(module: nn.Module, path: str, vocabularies: set[int]) -> bool:
    is_vocabulary = isinstance(module, nn.Linear) and module.out_features in vocabularies
    return is_vocabulary or path.rpartition(".")[2] in HEAD_NAMES


def _kind_by_shape(name: str, parameter: nn.Parameter) -> ParameterKind:
    if parameter.ndim != 2:
        return "vector"
    return "embedding" if _is_embedding(name) else "matrix"


def _is_embedding(name: str) -> bool:
    return "emb" in name.lower()
