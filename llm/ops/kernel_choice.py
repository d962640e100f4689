"""The kernels that a run uses where the fastest one depends on the machine."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from llm.errors import ConfigError, did_you_mean

Product = Literal["mkl", "onednn"]
KERNELS = "kernels"
"""Key of the kernels in summary.json and in the manifest of a checkpoint."""
NEVER = 1 << 30
"""A size that no matrix has: a kernel that is used from this size on is never used."""


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """One kernel for each operation that has several; they sum in different orders.

    Args:
        product_forward: library for y = x Wᵀ in fp32 on a CPU.
        product_grad_input: library for dx = dy W.
        product_grad_weight: library for dW = dyᵀ x.
        product_reading: library for products without a gradient, such as those of decoding.
        attention: kernel on a CPU for rows of one document and for short rows: blocks of queries, or torch's own
            attention.
        short_row: rows up to this many keys share their products in blocks under a mask although their documents
            differ.
        muon_bf16_from: smaller side of a matrix from which `optimizer.matmul_dtype=auto` multiplies in bf16 on a CPU
            that does so in hardware.
    """

    product_forward: Product = "onednn"
    product_grad_input: Product = "onednn"
    product_grad_weight: Product = "onednn"
    product_reading: Product = "onednn"
    attention: Literal["blocked", "sdpa"] = "blocked"
    short_row: int = 512
    muon_bf16_from: int = 0


NAMES = tuple(field.name for field in fields(KernelChoice))
DEFAULT = KernelChoice()
"""The kernels of a run that measures nothing; tests compare each with the operation's definition."""

_HINTS = get_type_hints(KernelChoice)
_current = DEFAULT


def current() -> KernelChoice:
    """Return the kernels that are in use."""
    return _current


@contextlib.contextmanager
def using(choice: KernelChoice) -> Iterator[None]:
    """Use other kernels in this block."""
    global _current
    before, _current = _current, choice
    try:
        yield
    finally:
        _current = before


def given_kernels(setting: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the kernels that the key `kernels` names, by operation; none for `auto` and `default`.

    Raises:
        ConfigError: an operation or a kernel is unknown.
    """
    if isinstance(setting, str):
        if setting not in ("auto", "default"):
            raise ConfigError(
                f"kernels={setting}: unknown; use auto, default, or names as in 'kernels={{attention: sdpa}}'"
            )
        return {}
    for name, value in setting.items():
        if name not in NAMES:
            raise ConfigError(
                f"kernels.{name}={value}: no such operation; use {', '.join(NAMES)}{did_you_mean(str(name), NAMES)}"
            )
        legal = get_args(_HINTS[name])
        is_size = not legal and isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not is_size and value not in legal:
            rule = f"use one of {', '.join(legal)}" if legal else "must be a number of elements, at least 0"
            raise ConfigError(f"kernels.{name}={value}: {rule}")
    return dict(setting)
