"""Builds every pair of an attention and a position from conf/, and returns why a pair is invalid."""

from typing import Any

from catalogue import CONF, options
from hydra.utils import instantiate
from omegaconf import OmegaConf

from llm.contracts import AttentionGeometry
from llm.errors import ConfigError

GEOMETRY = AttentionGeometry(d_model=48, num_heads=4, num_kv_heads=2, head_dim=16)
SMALL = {
    "attention/vq": {"block_size": 20},
    "attention/linear": {"chunk_size": 16},
    "attention/delta": {"chunk_size": 16},
    "attention/performer": {"chunk_size": 16, "num_features": 64},
    "position/rerope": {"window": 11},
    "position/leaky_rerope": {"window": 11},
    "position/inv_leaky": {"window": 11},
}
"""Settings that make a short text pass through every part of a method."""


def build_small(option: str, settings: dict[str, Any], **supplied: Any) -> Any:
    """Build an option such as `attention/vq`, with settings by dotted key."""
    node = OmegaConf.load(CONF / "model" / f"{option}.yaml")
    for key, value in (SMALL.get(option, {}) | settings).items():
        OmegaConf.update(node, key, value, force_add=False)
    return instantiate(node, _convert_="all")(**supplied)


def build_pair(attention: str, position: str, **settings: Any) -> Any:
    """Build an attention over a position; settings are the attention's."""
    built = build_small(f"position/{position}", {}, head_dim=GEOMETRY.head_dim)
    return build_small(f"attention/{attention}", settings, position=built, layer_index=0, geometry=GEOMETRY)


def reason_against(attention: str, position: str) -> str | None:
    """Return the error message of an invalid pair, or None for a valid one."""
    try:
        build_pair(attention, position)
    except ConfigError as error:
        return str(error)
    return None


ALL_PAIRS = [(a, p) for a in options("model/attention") for p in options("model/position")]
VALID_PAIRS = [pair for pair in ALL_PAIRS if reason_against(*pair) is None]
INVALID_PAIRS = [pair for pair in ALL_PAIRS if pair not in VALID_PAIRS]
