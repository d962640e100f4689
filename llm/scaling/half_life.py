"""What a changed batch does to the memory of an optimizer, in tokens, and how to leave it as it was: pure functions.

A decay of β a step forgets half in ln 2 / −ln β updates, each of B tokens. At κ times the batch the half-life is κ
times as many tokens, unless β becomes β^κ; to first order that is the 1 − β → κ (1 − β) of Malladi et al.,
arXiv:2205.10287, definition 5.3, and it never leaves [0, 1). Weight decay forgets a share lr·λ a step: at κ times the
batch and f times the lr its half-life in tokens is κ / f times as long, unless λ becomes λ κ / f. Adam's eps is held
against a gradient whose noise is 1/√κ of what it was, and becomes eps / √κ (same definition; only while noise rules).
"""

from collections.abc import Mapping
from typing import Any

from llm.scaling.derivation import brief

PAIRS = ("betas", "aux_betas")
DECAYS = ("beta", "momentum", "row_beta")
EPSILONS = ("eps", "aux_eps")


def keep_half_life(settings: Mapping[str, Any], *, ratio: float, lr_scale: float) -> dict[str, Any]:
    """Return an optimizer's settings with which its memory in tokens is what it was at the base batch.

    Args:
        settings: of the optimizer, by the names that the project's optimizers share.
        ratio: κ, the batch over the base batch.
        lr_scale: f, what the scaling rule multiplies the lr by.
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
    """Say what became of the half-lives: which settings keep them, or by how much they are longer in tokens."""
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
