"""Decides whether torch.compile pays in a run on a CPU, from the length of the run and its compile time before."""

import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from llm.config.checked import CheckedConfig
from llm.model.transformer import Transformer
from llm.ops.flops import measured_matmul_flops
from llm.ops.tuning import machine_key, remember, remembered
from llm.training.timed_operations import Workload, workload_of

log = logging.getLogger(__name__)

SECONDS = "seconds"
UNKNOWN_SECONDS = 120.0
"""Compile time that is assumed on a machine that has not compiled this decoder: two to five times the measured ones."""
UTILIZATION = 0.4
"""Share of the measured rate of products at which an eager update is expected to run."""
GAIN = 0.1
"""Share of an eager run that compiled code is expected to save; measured: 0.09 to 0.3, see docs/performance.md."""
GRAPHS = 3
"""Compilations of a run, each about as long as the first: training, validation, and a last partial batch."""


@dataclass(frozen=True, kw_only=True)
class CompiledDecoder:
    """What decides how long a compilation takes."""

    num_layers: int
    workload: Workload

    @classmethod
    def of(cls, checked: CheckedConfig, model: Transformer) -> Self:
        """Return that of a run, whose micro-batch is known."""
        return cls(num_layers=len(model.blocks()), workload=workload_of(checked, model))


def pays_to_compile(checked: CheckedConfig, decoder: CompiledDecoder, *, flops: float, cache: Path) -> bool:
    """Return whether a run on a CPU is long enough to gain more time than compilations take.

    With t the time of one compilation and T the eager run's expected time, a run is compiled from GAIN T > GRAPHS t on.

    Args:
        checked: the configuration.
        decoder: the sizes that the time of a compilation depends on.
        flops: model FLOPs of the run.
        cache: folder in which earlier compile times are kept.
    """
    is_changing = len(checked.sizes.ramp.stages) > 1  # each shape is compiled anew
    if is_changing or checked.tree.get("adapt") or not has_compiler():
        return False
    rate = measured_matmul_flops(torch.bfloat16 if "16" in checked.sizes.precision else torch.float32)
    seconds = flops / (UTILIZATION * rate)
    if GAIN * seconds <= GRAPHS * _seconds_before(decoder, cache):
        return False
    log.info("compile      on, for a run of about %.0f min; compile=false turns it off", seconds / 60)
    return True


def keep_code_by_machine(cache: Path) -> None:
    """Make torch.compile store this machine's code apart from that of others, unless the environment names a folder.

    Its cache does not tell instruction sets apart: code of AVX-512 that ran under AVX2, and the reverse, returned NaN
    and corrupted memory.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "compiled" / machine_key()))


def has_compiler() -> bool:
    """Return whether torch.compile finds a C++ compiler for code on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name)


def _seconds_before(decoder: CompiledDecoder, cache: Path) -> float:
    found = (remembered(cache, decoder) or {}).get(SECONDS)
    return float(found) if isinstance(found, int | float) else UNKNOWN_SECONDS


class CompileClock(Callback):
    """A callback that remembers how long the first update took, nearly all of which is compilation.

    Args:
        decoder: the sizes that the time depends on.
        cache: folder in which it is kept.
    """

    def __init__(self, *, decoder: CompiledDecoder, cache: Path, now: Callable[[], float] = time.perf_counter) -> None:
        self.decoder, self.cache, self._now = decoder, cache, now
        self._began: float | None = None
        self._is_done = False

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """Start at the first micro-batch."""
        if self._began is None:
            self._began = self._now()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Stop after the first one."""
        if not self._is_done and self._began is not None and trainer.is_global_zero:
            remember(self.cache, self.decoder, {SECONDS: round(self._now() - self._began, 1)})
        self._is_done = True
