"""Defines which batch rules suit which family of optimizers, and returns a warning for a rule that does not suit."""

from collections.abc import Mapping
from typing import Any, get_args

from llm.contracts import HasTraits, MomentumWeights, OptimizerTraits, UpdateFamily
from llm.scaling.derivation import rule_of_factory

TORCH_TRAITS: Mapping[str, OptimizerTraits] = {
    "SGD": OptimizerTraits(
        update_family="gradient",
        momentum_weights=lambda settings: MomentumWeights.of_average(settings.get("momentum", 0.0)),
    ),
    **dict.fromkeys(
        ("Adam", "AdamW", "NAdam", "RAdam"),
        OptimizerTraits(
            update_family="adaptive",
            momentum_weights=lambda settings: MomentumWeights.of_average(settings.get("betas", (0.9, 0.999))[0]),
        ),
    ),
    **dict.fromkeys(("RMSprop", "Adagrad"), OptimizerTraits(update_family="adaptive")),
}
"""Traits of torch's optimizers by class name; an optimizer of this project states its own in `traits`."""

SUITS: Mapping[str, tuple[tuple[UpdateFamily, ...], str]] = {
    "linear": (
        ("gradient",),
        "a step that does not grow with the gradient keeps its size when a larger batch has less noise",
    ),
    "variance": (("gradient", "orthogonal"), "it describes the best step along the gradient itself"),
    "sqrt": (("adaptive", "sign", "orthogonal"), "a step along the gradient itself grows in proportion to the batch"),
    "sign": (("adaptive", "sign", "orthogonal"), "a step along the gradient itself grows in proportion to the batch"),
    "adam": (("adaptive",), "only a rule that divides by the root mean square of noisy gradients follows it"),
    "adam_eps": (("adaptive",), "only a rule that divides by the gradient's size has such an eps"),
}
"""For each rule, the families of optimizers that it suits, and the reason why it does not suit the others. The rule
`variance` suits orthogonal steps by measurement, with momentum=null; all other entries follow from the derivation."""

INSTEAD: Mapping[UpdateFamily, str] = {"gradient": "none", "adaptive": "sqrt", "sign": "sqrt", "orthogonal": "sqrt"}
"""The rule that the warning recommends for each family. It suits the family, and its regret in docs/scaling.md is
smaller than that of each rule that causes a warning; SGD's rules lie within its spread over seeds."""


def traits_of(optimizer: Any) -> OptimizerTraits | None:
    """Return the traits of an optimizer, its class or a factory of it; None if they are unknown."""
    rule, _ = rule_of_factory(optimizer)
    return rule.traits if isinstance(rule, HasTraits) else TORCH_TRAITS.get(rule.__name__)


def family_of(optimizer: Any) -> UpdateFamily | None:
    """Return the family of an optimizer's steps, or None if it is unknown."""
    traits = traits_of(optimizer)
    return traits.update_family if traits else None


def mismatch(rule: str, optimizer: type) -> str | None:
    """Return a warning if `rule` does not suit the optimizer, else None."""
    family = family_of(optimizer)
    families, reason = SUITS.get(rule, (get_args(UpdateFamily), ""))
    if family is None or family in families:
        return None
    return (
        f"scaling={rule}: does not suit {optimizer.__name__}, whose steps are of the kind {family}: {reason}; "
        f"use scaling={INSTEAD[family]}, which lost less in the measurement of docs/scaling.md"
    )
