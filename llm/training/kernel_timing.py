"""Decides the kernels of a run: those of its checkpoint, those that `kernels` names, or the fastest on this machine."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from llm.config.checked import CheckedConfig
from llm.distributed.launch import find_launch
from llm.distributed.rendezvous import agree
from llm.model.transformer import Transformer
from llm.ops.kernel_choice import DEFAULT, KernelChoice, given_kernels
from llm.ops.products import HAS_ONEDNN
from llm.ops.tuning import fastest, measure, remember, remembered
from llm.training.timed_operations import ALL_MKL, Workload, operations_of, whole_layers, workload_of

log = logging.getLogger(__name__)

WORTHWHILE_FLOPS = 2e12
"""FLOPs of a run below which nothing is measured, since a run of a few seconds would not gain the time back."""


def decided_kernels(
    checked: CheckedConfig,
    model: Transformer,
    folder: Path,
    *,
    flops_per_token: float,
    cache: Path,
    recorded: Mapping[str, Any] | None,
) -> KernelChoice:
    """Return the kernels of a run, which are the same on every rank, and log them where they were measured.

    Args:
        checked: the configuration, with the size of its micro-batches.
        model: the decoder.
        folder: the run folder, which names the agreement of the ranks.
        flops_per_token: FLOPs of training per token, those of the objective.
        cache: the folder in which measurements are kept.
        recorded: the kernels of the checkpoint that the run resumes; None for a new run. They are kept, because
            another kernel sums in another order.
    """
    known = {field.name for field in fields(KernelChoice)}
    if recorded is not None:
        return _available(KernelChoice(**{name: value for name, value in recorded.items() if name in known}))
    given = given_kernels(checked.run.kernels)
    flops = flops_per_token * checked.sizes.ramp.tokens_seen(checked.sizes.total_steps)
    is_short = flops < WORTHWHILE_FLOPS
    if checked.run.kernels == "default" or checked.sizes.accelerator != "cpu" or is_short:
        return _available(replace(DEFAULT, **given))
    launch, found = find_launch(), ""
    if launch is None or launch.rank == 0:
        found = json.dumps(_measured(workload_of(checked, model), given, cache))
    if launch is not None:
        found = agree(found, launch, about=f"kernels of {folder}")
    return replace(DEFAULT, **json.loads(found))


def _available(choice: KernelChoice) -> KernelChoice:
    """Return a choice with MKL where this torch has no oneDNN."""
    if HAS_ONEDNN:
        return choice
    return replace(choice, **{name: "mkl" for name in asdict(choice) if name.startswith("product_")})


def _measured(workload: Workload, given: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Return the fastest kernels by operation, with those that were given."""
    began, winners = time.perf_counter(), remembered(cache, workload)
    how = "measured before on this machine"
    if winners is None:
        winners = measure([operation for operation in operations_of(workload) if operation.name not in given])
        products = {winners.get(name) for name in ALL_MKL}
        if products == {"onednn", "mkl"} and fastest(whole_layers(workload, winners)) == "mkl":
            winners |= ALL_MKL
        how = f"measured in {time.perf_counter() - began:.1f} s"
        if not given:
            remember(cache, workload, winners)
    chosen = winners | given
    names = ", ".join(f"{name} {value}" for name, value in chosen.items())
    log.info("kernels      %s", f"{names} ({how})" if names else "the defaults; no operation has another kernel here")
    return chosen
