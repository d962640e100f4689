"""Precisions of a run, and the fastest one of a device."""

import logging
from functools import cache

import torch

from llm.errors import ConfigError
from llm.ops.kernel_choice import current

log = logging.getLogger(__name__)

PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true", "64-true")


def resolve_precision(precision: str | int, *, accelerator: str) -> str:
    """Return `precision`; `auto` is bf16-mixed where the device multiplies bf16 in hardware, else 32-true.

    On CPUs with AVX512-BF16 or AMX a training step is several times faster in bf16. Without them bf16 is emulated and
    slower than fp32 (measured in docs/performance.md).

    Raises:
        ConfigError: the precision is unknown.
    """
    if str(precision) not in PRECISIONS:
        raise ConfigError(f"trainer.precision={precision}: unknown; choose one of {' '.join(PRECISIONS)}")
    if precision != "auto":
        return str(precision)
    if accelerator == "cpu":
        return "bf16-mixed" if cpu_multiplies_bf16() else "32-true"
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16-mixed"
    if torch.cuda.is_available():
        _warn_once(torch.cuda.get_device_name())
    return "32-true"


@cache
def _warn_once(device: str) -> None:
    log.warning("trainer.precision=auto: %s has no bf16 products in hardware, so this run uses 32-true", device)


@cache
def cpu_multiplies_bf16() -> bool:
    """Return whether this CPU multiplies bf16 in hardware: AVX512-BF16, AMX, or Arm's BF16 extension."""
    read = getattr(torch.cpu, "get_capabilities", None)
    if read is None:
        return bool(torch.cpu._is_avx512_bf16_supported())
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # the processor, or ATEN_CPU_CAPABILITY, which emulates one
        return False
    capabilities = read()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "arm_bf16", "bf16"))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fast_dtype(device_type: str, *, size: int) -> torch.dtype:
    """Return bfloat16 on a GPU, or on a CPU with AVX512-BF16 or AMX for matrices that are large enough, else float32.

    Args:
        device_type: kind of device.
        size: smaller side of the matrix; `KernelChoice.muon_bf16_from` is the smallest that gains from bfloat16.
    """
    if device_type != "cpu":
        return torch.bfloat16
    is_fast = size >= current().muon_bf16_from and cpu_multiplies_bf16()
    return torch.bfloat16 if is_fast else torch.float32


def products_dtype(name: str, device_type: str, *, size: int) -> torch.dtype:
    """Return the dtype called `name`; for "auto", the fast one of the device for matrices of this smaller side."""
    return fast_dtype(device_type, size=size) if name == "auto" else DTYPES[name]
