"""Chooses the fastest of several kernels by timing them on this machine, and remembers the result in a file."""

import hashlib
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

CACHE = "kernels.json"
REPEATS = 4
"""Timings per candidate at least, of which the smallest counts: a busy machine only ever adds time."""
AGREEMENT = 1.1
"""Factor within which the two smallest times of a candidate must agree; else the machine is too busy to tell."""
MARGIN = 0.95
"""Share of the default's time that another candidate must stay below."""
SECONDS_PER_OPERATION = 0.25
"""Time after which an operation's measurement ends. The turns decide if the smallest times do not agree by then."""
CHANCE = 0.01
"""Probability of so many won turns, were both equally fast, below which a candidate counts as faster."""

ISA_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that limit the instructions of torch, oneDNN and MKL."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation with several kernels.

    Args:
        name: its name in `KernelChoice`.
        candidates: a call to time for each value, the default first.
    """

    name: str
    candidates: Mapping[Any, Callable[[], Any]]


def fastest(operation: Operation) -> Any:
    """Return the value whose call is fastest; the first unless another one is clearly and reproducibly faster.

    The candidates take turns, so that a change of the machine's load meets all of them. Their smallest times are
    compared once these are reproduced. On a machine too busy for that, a candidate must win significantly many turns.
    """
    seconds: dict[Any, list[float]] = {value: [] for value in operation.candidates}
    for call in operation.candidates.values():  # the first call compiles kernels and touches memory
        call()
    began = time.perf_counter()
    while not (is_settled := _is_settled(seconds.values())) and time.perf_counter() - began < SECONDS_PER_OPERATION:
        for value, call in operation.candidates.items():
            start = time.perf_counter()
            call()
            seconds[value].append(time.perf_counter() - start)
    default = next(iter(seconds))
    best = {value: min(times) for value, times in seconds.items()}
    if not is_settled:
        best = {value: statistics.median(seconds[value]) for value in best if _wins(seconds[value], seconds[default])}
        best[default] = statistics.median(seconds[default])
    winner = min(best, key=lambda value: best[value])
    return winner if best[winner] < MARGIN * best[default] else default


def _wins(times: list[float], default: list[float]) -> bool:
    """Return whether a candidate is below MARGIN of the default's time in significantly many turns: a sign test."""
    turns = len(times)
    won = sum(own < MARGIN * other for own, other in zip(times, default, strict=True))
    return sum(math.comb(turns, n) for n in range(won, turns + 1)) / 2**turns < CHANCE


def _is_settled(timings: Iterable[list[float]]) -> bool:
    """Return whether each candidate has enough timings, and its smallest one was reproduced."""
    smallest = [sorted(times)[:2] for times in timings if len(times) >= REPEATS]
    return bool(smallest) and all(second <= AGREEMENT * first for first, second in smallest)


def machine_key() -> str:
    """Return a hash of what decides the speed of kernels: processor, instructions, libraries and threads."""
    facts = {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "limits": {name: os.environ.get(name) for name in ISA_VARIABLES},
        "torch": torch.__version__,
        "libraries": torch.__config__.show(),
        "threads": torch.get_num_threads(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _processor() -> str:
    """Return the family and model of the processor, whose marketing name a virtual machine may hide."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU implementer", "CPU part")
    return "; ".join(sorted({line for line in lines if line.split("\t")[0].strip() in wanted}))


def measure(operations: list[Operation]) -> dict[str, Any]:
    """Return the winner of each operation."""
    return {operation.name: fastest(operation) for operation in operations}


def remembered(folder: Path, workload: Any) -> dict[str, Any] | None:
    """Return the winners that an earlier run with this workload found on this machine, None without one."""
    found = _read(folder / CACHE).get(_key(workload))
    return found if isinstance(found, dict) else None


def remember(folder: Path, workload: Any, winners: Mapping[str, Any]) -> None:
    """Store winners for later runs; a folder that cannot be written only costs them a measurement."""
    path = folder / CACHE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{CACHE}.{os.getpid()}")
        temporary.write_text(json.dumps(_read(path) | {_key(workload): dict(winners)}, indent=1))
        temporary.replace(path)
    except OSError as error:
        log.warning("loader.cache_dir=%s: the choice of kernels is not stored (%s)", folder, error)


def _key(workload: Any) -> str:
    facts = json.dumps(asdict(workload), sort_keys=True, default=str)
    return f"{machine_key()}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # missing, or damaged: it is measured again
        return {}
    return found if isinstance(found, dict) else {}
