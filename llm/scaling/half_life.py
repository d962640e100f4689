"""Adjusts an optimizer's decay rates to the batch size, so that its half-lives in tokens do not change.

An exponential average with decay rate β has a half-life of ln 2 / −ln β updates of B tokens each. A batch κ times as
large makes the half-life κ times as long in tokens, unless β becomes β^κ. To first order that is the rule
1 − β → κ (1 − β) of Malladi et al., arXiv:2205.10287, definition 5.3, but β^κ always lies in [0, 1).

Weight decay removes a share lr·λ of the weights per update. At κ times the batch and f times the lr, its half-life in
tokens is κ / f times as long, unless λ becomes λ κ / f. The gradient's noise, to which Adam adds eps, falls by a factor
of √κ, so eps becomes eps / √κ. This too is from definition 5.3, and holds only while noise dominates the gradient.
"""

from collections.abc import Mapping
from typing import Any

from llm.scaling.derivation import brief

PAIRS = ("betas", "aux_betas")
DECAYS = ("beta", "momentum", "row_beta")
EPSILONS = ("eps", "aux_eps")


def keep_half_life(settings: Mapping[str, Any], *, ratio: float, lr_scale: float) -> dict[str, Any]:
    """Return an optimizer's settings, adjusted so that its half-lives in tokens are those at the base batch.

    Args:
        settings: settings of the optimizer, by the names that the project's optimizers share.
        ratio: κ, the batch divided by the base batch.
        lr_scale: f, the factor by which the scaling rule multiplies the lr.
    """
    kept = dict(settings)
    for key in PAIRS:
        if kept.get(key) is not None:
            kept[key] = [beta**ratio for beta in kept[key]]
    for key in DECAYS:
        if kept.get(key) is not None:
            kept[key] = kept[key] ** ratio
    for key in EPSILONS:
        if kept.get(key) is not None:
            kept[key] = kept[key] / ratio**0.5
    kept["weight_decay"] = kept["weight_decay"] * ratio / lr_scale
    return kept


def half_life_note(before: Mapping[str, Any], after: Mapping[str, Any], *, ratio: float, lr_scale: float) -> str:
    """Describe the settings that keep the half-lives in tokens, or the factor by which the half-lives change."""
    changed = [
        f"{key} {_show(before[key])} -> {_show(after[key])}"
        for key in (*PAIRS, *DECAYS, *EPSILONS, "weight_decay")
        if key in before and before[key] != after[key]
    ]
    if changed:
        return f"half-lives in tokens kept: {', '.join(changed)}"
    if ratio == 1:
        return ""
    decay = f", of weight decay x {ratio / lr_scale:.2g}" if before.get("weight_decay") else ""
    return f"half-life in tokens of averages x {ratio:.3g}{decay}"


def _show(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "/".join(f"{beta:.3g}" for beta in value)
    return f"{value:.3g}" if abs(value) > 1e-3 else brief(value)
