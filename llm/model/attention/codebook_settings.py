"""Names the estimators of a codebook and checks its settings."""

from typing import Literal

from llm.errors import ConfigError

Estimator = Literal["ema", "straight_through", "rotation", "simvq", "diveq"]

BY_GRADIENT = ("straight_through", "rotation", "diveq")
"""Estimators whose codes are a parameter."""


def check_codebook(
    codebook_size: int, estimator: Estimator, commitment_weight: float, ema_decay: float, revive_every: int | None
) -> None:
    """Raise ConfigError for a setting that is out of range."""
    key = "model.attention.codebook"
    if codebook_size < 2:
        raise ConfigError(f"{key}.codebook_size={codebook_size}: must be at least 2; 512 is usual")
    if commitment_weight < 0:
        raise ConfigError(f"{key}.commitment_weight={commitment_weight}: must be at least 0; try 0.02")
    if not 0 <= ema_decay < 1:
        raise ConfigError(f"{key}.ema_decay={ema_decay}: must lie in [0, 1); 0.99 is usual")
    if revive_every is not None and revive_every < 1:
        raise ConfigError(f"{key}.revive_every={revive_every}: must be at least 1 step, or null for never")
    if estimator == "diveq" and commitment_weight:
        raise ConfigError(
            f"{key}.commitment_weight={commitment_weight}: estimator=diveq learns from the language model's loss "
            "alone; set it to 0"
        )
