"""Converts rotary positions to and from the settings of config.json."""

import math
from collections.abc import Mapping
from typing import Any

from llm.model.position.linear_scaling import LinearScalingRoPE
from llm.model.position.llama3 import Llama3RoPE
from llm.model.position.ntk import NTKRoPE
from llm.model.position.position_module import Position
from llm.model.position.rope import RoPE
from llm.model.position.yarn import YaRNRoPE, yarn_amplitude

POSITIONS = {"default": "rope", "linear": "linear_scaling", "llama3": "llama3", "yarn": "yarn"}
"""The option of model/position that computes each `rope_type`."""

EXPORTED = (RoPE, NTKRoPE, LinearScalingRoPE, Llama3RoPE, YaRNRoPE)
"""Positions that config.json can express."""


def rotary_share(position: Position, head_dim: int) -> float:
    """Return the `partial_rotary_factor` of a rotary position, of which transformers rounds head_dim · factor down."""
    turning = 2 * len(position.frequencies)
    share = turning / head_dim
    return share if int(head_dim * share) == turning else math.nextafter(share, 2.0)


def rope_parameters(position: Position) -> dict[str, Any]:
    """Return the `rope_parameters` under which Hugging Face's classes compute one of the `EXPORTED` positions."""
    assert isinstance(position, RoPE)
    if isinstance(position, NTKRoPE):
        turning = 2 * len(position.frequencies)
        theta = position.base * position.factor ** (turning / (turning - 2))
        return {"rope_type": "default", "rope_theta": theta}
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": position.base}
    if isinstance(position, LinearScalingRoPE):
        return parameters | {"rope_type": "linear", "factor": position.factor}
    if isinstance(position, Llama3RoPE):
        return parameters | {
            "rope_type": "llama3",
            "factor": position.factor,
            "low_freq_factor": position.low_freq_factor,
            "high_freq_factor": position.high_freq_factor,
            "original_max_position_embeddings": position.original_context_length,
        }
    if isinstance(position, YaRNRoPE):
        return parameters | {
            "rope_type": "yarn",
            "factor": position.factor,
            "beta_fast": position.beta_fast,
            "beta_slow": position.beta_slow,
            "truncate": position.truncate,
            "attention_factor": position.amplitude,
            "original_max_position_embeddings": position.original_context_length,
        }
    return parameters


def rope_settings(config: Mapping[str, Any], *, default_base: float) -> dict[str, Any]:
    """Return the settings of the rotary position that config.json describes, completed as transformers does.

    Args:
        config: with the class's defaults filled in.
        default_base: the class's base where the file names none.
    """
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    settings: dict[str, Any] = {
        "rope_type": kind,
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or default_base),
        "partial_rotary_factor": 1.0 if share is None else float(share),
    }
    if kind == "default" or kind not in POSITIONS:
        return settings
    length = config["max_position_embeddings"]
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or length
    factor = rope.get("factor") or length / original
    settings["factor"] = float(factor)
    if kind == "linear":
        return settings
    settings["original_context_length"] = original
    if kind == "llama3":
        return settings | {key: float(rope[key]) for key in ("low_freq_factor", "high_freq_factor") if key in rope}
    return settings | {
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "truncate": rope.get("truncate", True),
        "attention_factor": rope.get("attention_factor") or _attention_factor(factor, rope),
    }


def _attention_factor(factor: float, rope: Mapping[str, Any]) -> float:
    """Return YaRN's factor on queries and keys where config.json does not state it."""
    scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if scale and scale_all:
        return yarn_amplitude(factor, scale) / yarn_amplitude(factor, scale_all)
    return yarn_amplitude(factor)


def is_same(a: Any, b: Any) -> bool:
    """Return whether two settings are equal; numbers may differ by the rounding of a decimal text."""
    if isinstance(a, float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-9)
    return a == b
