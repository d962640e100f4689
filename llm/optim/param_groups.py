"""Kinds of parameters, and the tagged parameter groups that every optimizer accepts."""

from collections.abc import Mapping
from typing import Any, NotRequired, get_args

from torch import nn

from llm.contracts import HeadStack, InitializedModel, KindedModule, ParameterKind, ParamGroup
from llm.errors import ConfigError, did_you_mean

KINDS: tuple[ParameterKind, ...] = get_args(ParameterKind)

DEFAULT_KINDS: dict[type[nn.Module], dict[str, ParameterKind]] = {
    nn.Linear: {"weight": "matrix", "bias": "vector"},
    nn.Embedding: {"weight": "embedding"},
    nn.LayerNorm: {"weight": "vector", "bias": "vector"},
    nn.RMSNorm: {"weight": "vector"},
}
"""Kinds of the parameters of torch's modules. The project's modules declare theirs in the class attribute
`parameter_kinds`."""


class TaggedGroup(ParamGroup):
    """A `ParamGroup` with further values that some rules need, one entry per parameter."""

    resting_values: NotRequired[list[float]]
    """Value that Tiger shrinks each parameter towards: 1 for a gain, else 0."""
    heads: NotRequired[list[int]]
    """Heads stacked along the output rows, negative if along the input columns; 1 if the matrix has no heads."""
    initial_stds: NotRequired[list[float]]
    """Standard deviation of each parameter at initialization; 1/√d_in where it is 0 or unknown."""


def _own_kind(model: nn.Module, name: str) -> ParameterKind:
    """Return the kind that the module of parameter `name` declares."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    owner = type(module).__name__
    stated: Any = module.parameter_kinds if isinstance(module, KindedModule) else None
    if stated is None:
        stated = next((kinds for torch_type, kinds in DEFAULT_KINDS.items() if isinstance(module, torch_type)), {})
    if leaf not in stated:
        raise ConfigError(
            f"parameter_kinds: {module_name or 'model'} ({owner}) does not claim its parameter {leaf!r}; "
            f"add it to {owner}.parameter_kinds as one of {', '.join(KINDS)}"
        )
    kind = stated[leaf]
    if kind not in KINDS:
        raise ConfigError(
            f"parameter_kinds[{leaf!r}]={kind}: {module_name or 'model'} ({owner}) names an unknown kind; "
            f"use one of {', '.join(KINDS)}{did_you_mean(str(kind), KINDS)}"
        )
    return kind


def parameter_kinds(model: nn.Module) -> dict[str, ParameterKind]:
    """Return the kind of each trainable parameter, as declared by the module that owns it.

    A module declares its own parameters in `parameter_kinds: ClassVar = {"weight": "matrix", ...}`. The kinds of
    torch's Linear, Embedding, LayerNorm and RMSNorm are known. A tensor that several modules share appears once, under
    its first name. It is an embedding if any of the modules declares it as one.

    Raises:
        ConfigError: if a module does not declare one of its parameters, a kind is unknown, or two modules declare
            different kinds for a shared tensor.
    """
    uses: dict[int, list[tuple[str, ParameterKind]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            uses.setdefault(id(parameter), []).append((name, _own_kind(model, name)))
    kinds: dict[str, ParameterKind] = {}
    for claims in uses.values():
        kinds[claims[0][0]] = _shared_kind(claims)
    return kinds


def _shared_kind(uses: list[tuple[str, ParameterKind]]) -> ParameterKind:
    """Return the kind of a tensor with several names; an embedding tied to a head is an embedding."""
    kinds = {kind for _, kind in uses}
    if len(kinds) == 1:
        return uses[0][1]
    if "embedding" in kinds and kinds <= {"embedding", "head", "matrix"}:
        return "embedding"
    claims = ", ".join(f"{name} as {kind}" for name, kind in uses)
    raise ConfigError(f"parameter_kinds: one tensor is claimed twice, {claims}; let the modules agree on its kind")


def _resting_value(name: str, kind: ParameterKind, parameter: nn.Parameter) -> float:
    """Return 1 for a gain and 0 otherwise."""
    return 1.0 if kind == "vector" and parameter.ndim <= 1 and name.rpartition(".")[2] == "weight" else 0.0


def _heads(model: nn.Module) -> dict[str, int]:
    """Return the `parameter_heads` of all modules by full name, such as `{"q_proj.weight": 8, "o_proj.weight": -8}`."""
    return {
        f"{module_name}.{name}" if module_name else name: int(count)
        for module_name, module in model.named_modules()
        if isinstance(module, HeadStack)
        for name, count in module.parameter_heads.items()
    }


def build_param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    rates: Mapping[str, tuple[float, float]] | None = None,
    kinds: Mapping[str, ParameterKind] | None = None,
) -> list[ParamGroup]:
    """Sort the trainable parameters of `model` into one tagged group per kind and pair of rates.

    Args:
        model: model whose modules declare `parameter_kinds`. They may also declare `parameter_heads`, the number of
            heads stacked in a projection, by dotted name; it is negative if the heads lie along the input.
        lr: peak learning rate, > 0.
        weight_decay: decoupled decay of matrices, >= 0; the other kinds get 0.
        rates: (lr, weight decay) of each parameter by name, in place of both; see `llm.scaling.rates`.
        kinds: kind of each trainable parameter by name; None for those that the modules state.

    Raises:
        ConfigError: an unclaimed or contradictory parameter, or nothing to train.
    """
    kinds = parameter_kinds(model) if kinds is None else kinds
    if not kinds:
        raise ConfigError(f"model={type(model).__name__}: has no trainable parameter; unfreeze some")
    parameters, heads = dict(model.named_parameters()), _heads(model)
    stds = model.initial_stds if isinstance(model, InitializedModel) else {}
    groups: list[ParamGroup] = []
    for kind in KINDS:
        shared = (lr, weight_decay if kind == "matrix" else 0.0)
        pairs: dict[tuple[float, float], list[str]] = {}
        for name in (name for name, its_kind in kinds.items() if its_kind == kind):
            pairs.setdefault(shared if rates is None else rates[name], []).append(name)
        for (its_lr, its_decay), names in pairs.items():
            groups.append(
                TaggedGroup(
                    params=[parameters[name] for name in names],
                    names=names,
                    kind=kind,
                    lr=its_lr,
                    weight_decay=its_decay,
                    resting_values=[_resting_value(name, kind, parameters[name]) for name in names],
                    heads=[heads.get(name, 1) for name in names],
                    initial_stds=[stds.get(name) or _usual_std(parameters[name]) for name in names],
                )
            )
    check_partition(model, groups)
    return groups


def _usual_std(parameter: nn.Parameter) -> float:
    """Return the standard deviation of a usual initialization, 1/√d_in: for a tensor whose own is 0 or unknown."""
    return max(1, parameter.shape[-1] if parameter.ndim else 1) ** -0.5


def check_partition(model: nn.Module, groups: list[ParamGroup]) -> None:
    """Check that each trainable parameter of `model` is in exactly one group.

    Raises:
        ConfigError: if parameters are missing, repeated or not part of the model; the message names them.
    """
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for key, name in names.items() if key not in set(grouped)]
    repeated = [names.get(key, "a foreign tensor") for key in set(grouped) if grouped.count(key) > 1]
    foreign = len(set(grouped) - set(names))
    if missing or repeated or foreign:
        raise ConfigError(
            f"param_groups: {len(missing)} parameters in no group {missing[:3]}, {len(repeated)} in several "
            f"{repeated[:3]}, {foreign} not of the model; build them with build_param_groups"
        )
