"""Describes a scaled learning rate in one line, and warns of a batch rule that does not suit the optimizer."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

Family = Literal["gradient", "adaptive", "sign", "orthogonal"]
"""Kinds of steps: along the gradient, along the gradient divided by its size, by signs, or by orthogonal matrices."""

TORCH_FAMILIES: Mapping[str, Family] = {
    "SGD": "gradient",
    "Adam": "adaptive",
    "AdamW": "adaptive",
    "NAdam": "adaptive",
    "RAdam": "adaptive",
    "RMSprop": "adaptive",
    "Adagrad": "adaptive",
}
"""Families of torch's optimizers; an optimizer of this project states its own in `update_family`."""

SUITS: Mapping[str, tuple[tuple[Family, ...], str]] = {
    "linear": (
        ("gradient",),
        "a step that does not grow with the gradient keeps its size when a larger batch has less noise",
    ),
    "variance": (("gradient", "orthogonal"), "it describes the best step along the gradient itself"),
    "sqrt": (("adaptive", "sign", "orthogonal"), "a step along the gradient itself grows in proportion to the batch"),
    "sign": (("adaptive", "sign", "orthogonal"), "a step along the gradient itself grows in proportion to the batch"),
    "adam_eps": (("adaptive",), "only a rule that divides by the gradient's size has such an eps"),
}
"""Rule -> the families that it suits by derivation or, for variance with orthogonal steps, by measurement, and why no
others."""

INSTEAD: Mapping[Family, str] = {"gradient": "none", "adaptive": "sqrt", "sign": "sqrt", "orthogonal": "variance"}
"""The rule to recommend per family: among the rules that suit it, one with less regret in docs/scaling.md than any rule
that is warned of."""


def family_of(optimizer: type) -> Family | None:
    """Return the family of an optimizer's steps, or None if it is unknown."""
    return getattr(optimizer, "update_family", None) or TORCH_FAMILIES.get(optimizer.__name__)


def mismatch(rule: str, optimizer: type) -> str | None:
    """Return a warning if `rule` does not suit the optimizer, else None."""
    family = family_of(optimizer)
    families, reason = SUITS.get(rule, (get_args(Family), ""))
    if family is None or family in families:
        return None
    return (
        f"scaling={rule}: does not suit {optimizer.__name__}, whose steps are of the kind {family}: {reason}; "
        f"use scaling={INSTEAD[family]}, which lost less in the measurement of docs/scaling.md"
    )


def rule_and_settings(scaling: Callable[..., float]) -> tuple[str, dict[str, Any]]:
    """Return the name and the settings of a rule, which Hydra passes as a partial function."""
    rule = getattr(scaling, "func", scaling)
    return getattr(rule, "__name__", type(rule).__name__), dict(getattr(scaling, "keywords", {}))


def derivation(scaling: Callable[..., float], *, lr: float, batch_tokens: int) -> str:
    """Return `lr 3.0e-3 -> 4.9e-3: sign rule, batch 16k -> 64k tokens, noise scale 41k`.

    Args:
        scaling: the rule with its settings.
        lr: the rate at the base batch.
        batch_tokens: tokens per update.
    """
    rule, settings = rule_and_settings(scaling)
    base, scale = settings.get("base_batch_tokens"), settings.get("noise_scale")
    if rule == "none" or base in (None, batch_tokens):
        reason = "no rule" if rule == "none" else f"{rule} rule at its base"
        return f"lr {brief(lr)} as given: {reason}, batch {thousands(batch_tokens)} tokens"
    noise = "" if scale is None else f", noise scale {thousands(scale)}"
    return (
        f"lr {brief(lr)} -> {brief(lr * scaling(batch_tokens))}: {rule} rule, batch {thousands(base)} -> "
        f"{thousands(batch_tokens)} tokens{noise}"
    )


def brief(value: float) -> str:
    """Return 3.0e-3 for 0.003."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def thousands(tokens: float) -> str:
    """Return 16.4k for 16384."""
    return f"{tokens / 1000:.3g}k" if tokens >= 1000 else f"{tokens:.3g}"
