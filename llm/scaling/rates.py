"""How each tensor's rate, decay and start follow from its shape: what rates share, and the plain ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from llm.contracts import ParameterKind
from llm.errors import ConfigError
from llm.scaling.derivation import rule_of_factory
from llm.scaling.suitability import family_of, traits_of

FINAL_NORM = "final_norm."
"""The norm before the head: its gain is where a wide model's scores are scaled down."""


class Tensor(NamedTuple):
    """What rates may depend on."""

    name: str
    kind: ParameterKind
    rows: int
    """d_out of a matrix, or of each expert in a stack."""
    columns: int
    """d_in."""
    std: float
    """Standard deviation at the start."""


class Rate(NamedTuple):
    """What a tensor gets."""

    lr: float
    weight_decay: float


class Update(NamedTuple):
    """How large an optimizer's step at lr = 1 is."""

    spectral_norm: Callable[[Tensor], float]
    """Largest singular value, up to a factor that all shapes share."""
    rms: Callable[[Tensor], float]
    """Root mean square of its elements, of gradients that are noise."""


class Rates:
    """Every tensor gets the run's lr, and matrices its weight decay; the base of rates that know more."""

    def check(self, optimizer: Callable[..., Any]) -> None:
        """Raise ConfigError for an optimizer that the rates do not know."""

    def prepare(self, model: nn.Module) -> None:
        """Change weights that have just been drawn."""

    def rate(self, tensor: Tensor, *, lr: float, weight_decay: float, d_model: int, update: Update) -> Rate:
        """Return the rate and decay of one tensor, from those of the run."""
        return Rate(lr, weight_decay if tensor.kind == "matrix" else 0.0)


def update_of(optimizer: Callable[..., Any]) -> Update:
    """Return how large the steps of an optimizer's factory are.

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

    def spectral_norm(tensor: Tensor) -> float:
        if own is not None and tensor.kind == "matrix":
            return own(settings, tensor.rows, tensor.columns)
        return (tensor.rows * tensor.columns) ** 0.5 * (tensor.std if is_relative else 1.0)

    def rms(tensor: Tensor) -> float:
        if own is not None and tensor.kind == "matrix":
            return own(settings, tensor.rows, tensor.columns) / max(tensor.rows, tensor.columns) ** 0.5
        return ((1 - beta) / (1 + beta)) ** 0.5 * (tensor.std if is_relative else 1.0)

    return Update(spectral_norm, rms)


def check_knows(rates: str, optimizer: Callable[..., Any]) -> None:
    """Raise ConfigError unless the size of the optimizer's steps is known whatever the gradient's."""
    rule, _ = rule_of_factory(optimizer)
    if family_of(rule) in (None, "gradient"):
        raise ConfigError(
            f"rates={rates}: the steps of {rule.__name__} are as large as the gradient, for which it has no rule; use "
            "optimizer=adamw, lion, tiger or muon, or rates=plain"
        )


def check_base_width(rates: str, base_d_model: object) -> None:
    """Raise ConfigError for a base width that is no positive whole number."""
    if not isinstance(base_d_model, int) or base_d_model < 1:
        raise ConfigError(
            f"rates.base_d_model={base_d_model}: must be at least 1; set the model.d_model at which optimizer.lr was "
            f"tuned, or rates=plain instead of {rates}"
        )
