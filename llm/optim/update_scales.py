"""Muon's scales: the factor on an orthogonal matrix by shape, and the rates of other tensors."""

from collections.abc import Callable, Mapping
from typing import Any

from llm.contracts import MomentumWeights


def _match_adamw(rows: float, columns: float) -> float:
    return 0.2 * max(rows, columns) ** 0.5


def _spectral(rows: float, columns: float) -> float:
    return max(1.0, rows / columns) ** 0.5


UPDATE_SCALES: dict[str, Callable[[float, float], float]] = {
    # Liu et al., "Muon is Scalable for LLM Training", arXiv:2502.16982, eq. 4: AdamW's lr and weight decay apply
    "match_adamw": _match_adamw,
    # Jordan et al. 2024, "Muon": the best lr does not change with the width
    "spectral": _spectral,
}

AUX_LR_SCALES = {"match_adamw": 1.0, "spectral": 0.2, "hyperball": 0.2, "adamw": 1.0, "lion": 0.2}
"""Factors of `aux_lr_scale="auto"`, by update scale and by rule; both factors are multiplied.

Matched updates take AdamW's own rates. The usual rate of spectral ones is 0.02, five times AdamW's at the sizes where
it was tuned, 4e-3; the relative steps of `hyperball` take about 0.03. Lion's rates are about a fifth of AdamW's,
because its steps have unit size.
"""


def muon_weights(settings: Mapping[str, Any]) -> MomentumWeights:
    """Return the weights of past gradients in what Muon orthogonalises; Nesterov adds the newest gradient again."""
    decay = settings["momentum"]
    average = MomentumWeights.of_average(decay)
    if not settings["nesterov"]:
        return average
    return MomentumWeights(1 - decay**2, decay * average.previous, decay)


def update_norm(settings: Mapping[str, Any], rows: float, columns: float) -> float:
    """Return the spectral norm of a step at lr = 1, for a factory with these settings."""
    return UPDATE_SCALES[settings["update_scale"]](rows, columns)
