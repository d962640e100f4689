"""Describes in one log line how the learning rate was scaled to the batch size."""

from collections.abc import Callable
from functools import partial
from typing import Any


def rule_of_factory(factory: Any) -> tuple[Any, dict[str, Any]]:
    """Return the function or class that a factory calls, and the settings that it passes."""
    return (factory.func, dict(factory.keywords)) if isinstance(factory, partial) else (factory, {})


def rule_and_settings(scaling: Callable[..., float]) -> tuple[str, dict[str, Any]]:
    """Return the name and the settings of a scaling rule, which Hydra passes as a partial function."""
    rule, settings = rule_of_factory(scaling)
    return getattr(rule, "__name__", type(rule).__name__), settings


def derivation(scaling: Callable[..., float], *, lr: float, batch_tokens: int) -> str:
    """Return a line such as `lr 3.0e-3 -> 4.9e-3: sign rule, batch 16k -> 64k tokens, noise scale 41k`.

    Args:
        scaling: scaling rule with its settings.
        lr: learning rate at the base batch.
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
    """Format a number with two digits and an exponent: 3.0e-3 for 0.003."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def thousands(tokens: float) -> str:
    """Format a number of tokens with three digits: 16.4k for 16384."""
    return f"{tokens / 1000:.3g}k" if tokens >= 1000 else f"{tokens:.3g}"
