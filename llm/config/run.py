"""The run-level keys of a configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run-level keys; everything else belongs to a group."""

    name: str
    seed: int
    max_steps: int | None
    max_tokens: int | None
    batch_tokens: int
    context_length: int
    micro_batch_size: int | Literal["auto"]
    val_every: int
    checkpoint_every: int
    on_nonfinite: Literal["raise", "skip", "tiger"]
    compile: bool | Literal["auto"]
    keep_half_life: bool
    resume: str | None
    init_from: str | None
    plan: bool
    qk_clip: float | None = None
    """Threshold of attention logits, see `llm.optim.qk_clip`; earlier runs have no such key."""
    kernels: Literal["auto", "default"] | dict[str, Any] = "auto"
    """Runs of version 0.1 have no such key."""


def run_config(cfg: Mapping[str, Any]) -> RunConfig:
    """Return the run-level keys of a plain configuration that passed `check`."""
    return RunConfig(**{f.name: cfg[f.name] for f in fields(RunConfig) if f.name in cfg})
