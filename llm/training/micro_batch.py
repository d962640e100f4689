"""Finds the largest micro-batch that fits, for `micro_batch_size=auto`, by trial steps."""

import logging
from collections.abc import Callable, Sequence

import psutil
import torch

from llm.errors import ConfigError

CPU_MEMORY_SHARE = 0.5
"""Share of the free memory that a micro-batch may use on a CPU, where exhausted memory kills the process."""
CPU_MICRO_BATCH_TOKENS = 8192
"""Tokens per micro-batch above which a CPU was not faster (see docs/performance.md)."""

log = logging.getLogger(__name__)


def find_micro_batch_size(
    trial: Callable[[int], int], *, candidates: Sequence[int], device: torch.device, context_length: int
) -> int:
    """Return the largest candidate that fits. The answer depends on memory alone, never on a timing.

    Args:
        trial: runs forward and backward on n windows, and returns the bytes of its activations.
        candidates: sizes that divide an update, largest first.
        device: device of the model.
        context_length: tokens per window.

    Raises:
        ConfigError: not even one window fits.
    """
    if device.type == "cpu":
        return _largest_on_cpu(trial, candidates, context_length)
    for n in candidates:
        try:
            trial(n)
            return n
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            log.info("micro_batch_size %d does not fit", n)
    raise ConfigError(
        f"context_length={context_length}: not one window fits the device; set model.activation_checkpointing=true, "
        "or choose a shorter context or a smaller model/size"
    )


def _largest_on_cpu(trial: Callable[[int], int], candidates: Sequence[int], context_length: int) -> int:
    bytes_a_window = max(1, trial(1))
    budget = CPU_MEMORY_SHARE * psutil.virtual_memory().available
    if bytes_a_window > budget:
        raise ConfigError(
            f"context_length={context_length}: one window needs {bytes_a_window / 2**30:.1f} GiB of activations and "
            f"{budget / 2**30:.1f} GiB may be used; choose a shorter context or a smaller model/size"
        )
    fitting = [
        n
        for n in candidates
        if n * bytes_a_window <= budget and n * context_length <= max(CPU_MICRO_BATCH_TOKENS, context_length)
    ]
    return fitting[0]
