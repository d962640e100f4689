"""Derives the learning rate and weight decay of each tensor from its kind and shape: base class and plain rates."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, get_args

from torch import nn

from llm.contracts import InitializedModel, ParameterKind
from llm.errors import ConfigError, did_you_mean
from llm.scaling.derivation import rule_of_factory
from llm.scaling.suitability import family_of, traits_of

FINAL_NORM = "final_norm."
"""Prefix of the norm before the head, whose gain scales down the scores of a wide model."""


class RatedTensor(NamedTuple):
    """Properties of a tensor that its rate may depend on."""

    name: str
    kind: ParameterKind
    rows: int
    """d_out of a matrix, or of each expert in a stack."""
    columns: int
    """d_in."""
    std: float
    """Standard deviation at initialization."""


class Rate(NamedTuple):
    """Learning rate and weight decay of a tensor."""

    lr: float
    weight_decay: float


class Update(NamedTuple):
    """Size of an optimizer's step at lr = 1."""

    spectral_norm: Callable[[RatedTensor], float]
    """Largest singular value, up to a factor that all shapes share."""
    rms: Callable[[RatedTensor], float]
    """Root mean square of its elements, for gradients that are noise."""


class Rates:
    """Plain rates, and the base of others: each tensor has the run's lr, and matrices have its weight decay.

        lr(W) = lr · lr_scales[kind],   λ(W) = weight_decay where kind is in decay_kinds, else 0

    Args:
        lr_scales: factors on the rates by kind (matrix, embedding, head, vector), each >= 0; 1 for kinds not named.
        decay_kinds: kinds that decay. None for the default of the class: matrices.

    Raises:
        ConfigError: an unknown kind, or a negative factor.
    """

    decayed: Sequence[str] = ("matrix",)
    """Kinds that decay where `decay_kinds` is None."""

    def __init__(
        self, *, lr_scales: Mapping[str, float] | None = None, decay_kinds: Sequence[str] | None = None
    ) -> None:
        kinds = get_args(ParameterKind)
        for key, names in {"lr_scales": lr_scales or {}, "decay_kinds": decay_kinds or ()}.items():
            if unknown := [name for name in names if name not in kinds]:
                near = did_you_mean(str(unknown[0]), kinds)
                raise ConfigError(f"rates.{key}={unknown[0]}: no such kind; use {', '.join(kinds)}{near}")
        if wrong := [kind for kind, scale in (lr_scales or {}).items() if not scale >= 0]:
            raise ConfigError(f"rates.lr_scales.{wrong[0]}={(lr_scales or {})[wrong[0]]}: must be at least 0; try 1")
        self.lr_scales = dict(lr_scales or {})
        self.decay_kinds = tuple(self.decayed if decay_kinds is None else decay_kinds)

    def check(self, optimizer: Callable[..., Any]) -> None:
        """Raise ConfigError for an optimizer that the rates cannot scale."""

    def prepare(self, model: nn.Module) -> None:
        """Change initial weights."""

    def rate(self, tensor: RatedTensor, *, lr: float, weight_decay: float, d_model: int, update: Update) -> Rate:
        """Return the rate and decay of one tensor, from those of the run."""
        found = self.own_rate(tensor, lr=lr, weight_decay=weight_decay, d_model=d_model, update=update)
        decay = found.weight_decay if tensor.kind in self.decay_kinds else 0.0
        return Rate(found.lr * self.lr_scales.get(tensor.kind, 1.0), decay)

    def own_rate(self, tensor: RatedTensor, *, lr: float, weight_decay: float, d_model: int, update: Update) -> Rate:
        """Return the rate of a tensor, and its decay if its kind decays, before `lr_scales`."""
        return Rate(lr, weight_decay)


def initialized(model: nn.Module) -> InitializedModel:
    """Return a model that knows its width and initial standard deviations.

    Raises:
        ConfigError: the model does not.
    """
    if not isinstance(model, InitializedModel):
        raise ConfigError(f"rates: {type(model).__name__} has no d_model and initial_stds; use rates=plain")
    return model


def update_of(optimizer: Callable[..., Any]) -> Update:
    """Return the size of the steps of an optimizer's factory.

    The steps of an elementwise rule have elements of one size. Because gradients have low rank, the spectral norm of
    such a step is about √(d_out · d_in), times the tensor's size if the rate is relative to it. Other rules declare the
    norm in `OptimizerTraits.update_norm`.
    """
    rule, settings = rule_of_factory(optimizer)
    traits = traits_of(rule)
    own = traits.update_norm if traits else None
    is_relative = traits is not None and traits.has_relative_rates
    is_adam = family_of(rule) == "adaptive" or settings.get("aux") == "adamw"
    beta = settings.get("betas", settings.get("aux_betas", [0.0]))[0] if is_adam else 0.0

    def spectral_norm(tensor: RatedTensor) -> float:
        if own is not None and tensor.kind == "matrix":
            return own(settings, tensor.rows, tensor.columns)
        return (tensor.rows * tensor.columns) ** 0.5 * (tensor.std if is_relative else 1.0)

    def rms(tensor: RatedTensor) -> float:
        if own is not None and tensor.kind == "matrix":
            return own(settings, tensor.rows, tensor.columns) / max(tensor.rows, tensor.columns) ** 0.5
        return ((1 - beta) / (1 + beta)) ** 0.5 * (tensor.std if is_relative else 1.0)

    return Update(spectral_norm, rms)


def check_knows(rates: str, optimizer: Callable[..., Any]) -> None:
    """Raise ConfigError unless the optimizer's steps have a size of their own, not that of the gradient or weights."""
    rule, settings = rule_of_factory(optimizer)
    if settings.get("hyperball"):
        raise ConfigError(
            f"rates={rates}: derives rates from the size of steps, and with optimizer.hyperball=true that is relative "
            "to each matrix; use rates=plain"
        )
    if family_of(rule) in (None, "gradient"):
        raise ConfigError(
            f"rates={rates}: has no rule for {rule.__name__}, whose steps are as large as the gradient; use "
            "optimizer=adamw, lion, tiger or muon, or rates=plain"
        )


class WidthRates(Rates):
    """The base of rates that depend on the width relative to a base width, at which lr was tuned.

    Args:
        base_d_model: width at which lr was tuned, at least 1. The base has the same head size and depth.
        lr_scales: see `Rates`.
        decay_kinds: see `Rates`.

    Raises:
        ConfigError: if the base width is below 1, or the steps of the optimizer are as large as the gradient.
    """

    option: ClassVar[str]
    """Name of the option in conf/rates, for error messages."""

    def __init__(
        self,
        *,
        base_d_model: int,
        lr_scales: Mapping[str, float] | None = None,
        decay_kinds: Sequence[str] | None = None,
    ) -> None:
        super().__init__(lr_scales=lr_scales, decay_kinds=decay_kinds)
        if not isinstance(base_d_model, int) or base_d_model < 1:
            raise ConfigError(
                f"rates.base_d_model={base_d_model}: must be at least 1; set the model.d_model at which optimizer.lr "
                f"was tuned, or rates=plain instead of {self.option}"
            )
        self.base_d_model = base_d_model

    def check(self, optimizer: Callable[..., Any]) -> None:
        """Raise ConfigError for SGD."""
        check_knows(self.option, optimizer)
