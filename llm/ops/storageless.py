"""Builds modules whose weights have shapes and no storage."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

DRAWING = (Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.trunc_normal_, init.kaiming_uniform_)
"""Functions that fill a tensor with random numbers and return it."""


class WithoutStorage(TorchFunctionMode):
    """Creates tensors of `torch.empty` and `torch.ones` on the meta device, and skips random initial values.

    Small tables, such as frequencies, are computed as usual. Only these few functions are replaced, because
    torch imports its compiler for most others on the meta device, which takes as long as importing torch.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func in DRAWING:
            return args[0] if args else options["tensor"]
        if func in (torch.empty, torch.ones):
            return torch.empty(*args, **{**options, "device": "meta"})
        return func(*args, **options)
