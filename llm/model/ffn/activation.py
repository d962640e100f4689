"""The settings of the activation of gated feed-forwards, and the metric of its size."""

from typing import Literal

from torch import Tensor

from llm.errors import ConfigError
from llm.ops.situ import Caps

Activation = Literal["swiglu", "situ"]

USUAL_CAPS = Caps(gate=4.0, up=25.0)
"""Caps of SiTU-GLU in kexue.fm/archives/11848: hidden units are at most 100, and their start is that of SwiGLU."""


def read_caps(activation: Activation, *, gate_cap: float | None, up_cap: float | None) -> Caps | None:
    """Return the caps of SiTU-GLU, or None for SwiGLU.

    Raises:
        ConfigError: a cap is set for SwiGLU, or a cap is not above 0.
    """
    for key, value in (("gate_cap", gate_cap), ("up_cap", up_cap)):
        if value is not None and activation == "swiglu":
            raise ConfigError(f"model.ffn.{key}={value}: bounds model.ffn.activation=situ alone; set it to null")
        if value is not None and not value > 0:
            raise ConfigError(f"model.ffn.{key}={value}: must be above 0, or null for {USUAL_CAPS}")
    if activation == "swiglu":
        return None
    return Caps(USUAL_CAPS.gate if gate_cap is None else gate_cap, USUAL_CAPS.up if up_cap is None else up_cap)


def largest_size(hidden: Tensor) -> Tensor:
    """Return the largest absolute value, detached and in fp32; 0 where there is none."""
    if not hidden.numel():
        return hidden.new_zeros((), dtype=hidden.float().dtype)
    low, high = hidden.detach().aminmax()
    return high.maximum(-low).float()
