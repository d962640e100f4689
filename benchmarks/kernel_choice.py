"""How fast is each kernel among which a run chooses, on this machine?

    python benchmarks/kernel_choice.py
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/kernel_choice.py

Printed is the smallest time of each candidate over the repeats, in ms; candidates take turns. The three variables above
limit a processor with AVX-512 to the instructions of AVX2, which also leaves it without bf16.
"""

import argparse
import time

import torch

from llm.ops.precision import cpu_multiplies_bf16
from llm.ops.tuning import Operation
from llm.training.timed_operations import Workload, operations_of


def smallest_times(operation: Operation, repeats: int) -> dict[object, float]:
    """Return the smallest time of each candidate in ms."""
    seconds: dict[object, list[float]] = {value: [] for value in operation.candidates}
    for _ in range(repeats + 1):
        for value, call in operation.candidates.items():
            start = time.perf_counter()
            call()
            seconds[value].append(time.perf_counter() - start)
    return {value: 1000 * min(times[1:]) for value, times in seconds.items()}


def show(name: str, workload: Workload, repeats: int, only: str = "") -> None:
    """Print one row per operation of a workload."""
    for operation in operations_of(workload):
        if only in operation.name:
            found = smallest_times(operation, repeats)
            default = next(iter(found.values()))
            cells = "  ".join(f"{value} {ms:.2f} ({default / ms:.2f})" for value, ms in found.items())
            print(f"{name:28}{operation.name:22}{cells}", flush=True)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{torch.backends.cpu.get_cpu_capability()}, {args.threads} threads; ms (speed relative to the default)")
    sizes = {"windows": 8, "heads": None, "muon_sizes": ()}
    for d_model, d_ff in ((128, 384), (384, 1024), (768, 2048)):
        work = Workload(context_length=256, matrices=((d_ff, d_model),), precision="32-true", **sizes)
        show(f"{d_model} x {d_ff}", work, args.repeats)
    dtypes = ["32-true", *(["bf16-mixed"] if cpu_multiplies_bf16() else [])]
    for precision in dtypes:
        for context in (64, 256, 512, 1024, 2048):
            options = sizes | {"heads": (6, 6, 64), "windows": 64}
            work = Workload(context_length=context, matrices=(), precision=precision, **options)
            for name in ("attention", "short_row"):
                show(f"{precision} {context}", work, args.repeats, only=name)
    for size in (128, 256, 384, 768):
        options = sizes | {"muon_sizes": (size,)}
        work = Workload(context_length=256, matrices=(), precision="32-true", **options)
        show(f"orthogonalize {size}", work, args.repeats, only="muon")


if __name__ == "__main__":
    main()
