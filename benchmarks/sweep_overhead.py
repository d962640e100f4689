"""What does a job of a sweep cost more than the same run alone?

    python benchmarks/sweep_overhead.py --repeats 3

Every job trains a tiny model for a few updates. A job's marginal cost is (sweep of many - sweep of one) / (many - 1).
With one process per job it is compared with `python train.py` with the same arguments. In one process, where a job
imports nothing, it is compared with the same run minus the time of its imports. CPU seconds are printed next to wall
time; on a machine that does other work, compare the CPU seconds.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "model.ffn.d_ff=48",
    "tokenizer=bytes", "context_length=32", "batch_tokens=256", "micro_batch_size=4", "max_steps=8", "val_every=8",
    "checkpoint_every=8", "loader.val_tokens=512", "trainer=cpu", "callbacks.samples=null", "callbacks.curves=null",
    "data=text",
)  # fmt: skip


def measure(command: Sequence[str], folder: Path) -> tuple[float, float]:
    """Run a command; return seconds by the clock, and CPU seconds of it and its children."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - began, cpu


def once(folder: Path, many: int) -> dict[str, tuple[float, float]]:
    """Measure everything once, in turn."""
    files = [*TINY, f"data.files={folder}/corpus/*.txt", f"loader.cache_dir={folder}/cache"]
    run = [sys.executable, str(ROOT / "train.py"), *files]
    imports = "import llm.commands.cli, llm.training.train, data.data_module, data.sources, data.tokenizer"
    seeds = ",".join(map(str, range(many)))

    def sweep(isolate: str, jobs: str) -> tuple[float, float]:
        own = ["sweep.report=false", "sweep.resume=null", f"sweep.isolate={isolate}", f"seed={jobs}"]
        return measure([*run, "-m", *own], folder)

    found = {"imports": measure([sys.executable, "-c", imports], folder), "plain": measure([*run, "seed=0"], folder)}
    for isolate in ("true", "false"):
        one, all_of_them = sweep(isolate, "0"), sweep(isolate, seeds)
        marginal = [(a - b) / (many - 1) for a, b in zip(all_of_them, one, strict=True)]
        found[f"isolate={isolate}"] = (marginal[0], marginal[1])
    return found


def main() -> None:
    """Print medians and the overhead that follows from them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        for n in range(40):
            text = "\n".join(f"{n} plus {i} makes {n + i}, and {n} times {i} makes {n * i}." for i in range(20))
            (folder / "corpus" / f"{n}.txt").write_text(text)
        once(folder, 2)  # fills the token cache
        rounds = [once(folder, arguments.jobs) for _ in range(arguments.repeats)]
    print("| seconds | clock, median (lowest to highest) | CPU, median (lowest to highest) |\n|---|---|---|")
    for what in rounds[0]:
        print(f"| {what} | " + " | ".join(_spread([r[what][i] for r in rounds]) for i in (0, 1)) + " |")
    for label, less in (("isolate=true", False), ("isolate=false", True)):
        beyond = [[r[label][i] - r["plain"][i] + (r["imports"][i] if less else 0.0) for r in rounds] for i in (0, 1)]
        against = "the plain run" + (" less its imports" if less else "")
        print(f"| {label}, beyond {against} | {' | '.join(map(_spread, beyond))} |")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
