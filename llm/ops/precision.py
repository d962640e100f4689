"""Which arithmetic a device does fastest."""

import torch

from llm.errors import ConfigError

PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true", "64-true")


def resolve_precision(precision: str | int, *, accelerator: str) -> str:
    """Return `precision`, or for `auto` bf16-mixed where the device multiplies bf16 in hardware, else 32-true.

    On CPUs with AVX512-BF16 or AMX a training step measured several times faster in bf16; without them bf16 is
    emulated and slower than fp32 (see docs/performance.md).

    Raises:
        ConfigError: an unknown precision.
    """
    if str(precision) not in PRECISIONS:
        raise ConfigError(f"trainer.precision={precision}: unknown; choose one of {' '.join(PRECISIONS)}")
    if precision != "auto":
        return str(precision)
    if accelerator == "cpu":
        return "bf16-mixed" if cpu_multiplies_bf16() else "32-true"
    return "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 dot products (AVX512-BF16, AMX, or Arm's BF16 extension)."""
    read = getattr(torch.cpu, "get_capabilities", None)
    if read is None:
        return bool(torch.cpu._is_avx512_bf16_supported())
    capabilities = read()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "arm_bf16", "bf16"))
