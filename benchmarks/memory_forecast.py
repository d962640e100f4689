"""Does `plan=true` foretell the peak memory of a run on a CPU?

    python benchmarks/memory_forecast.py model/size=124m context_length=512 batch_tokens=2048 micro_batch_size=4
    python benchmarks/memory_forecast.py --cases adamw muon --models dense moe -- model/size=small

Runs `train.py plan=true` and then two updates with validation and a checkpoint, one case after the other, and compares
the total of the plan with the peak resident size that the system reports for the process.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = ["max_steps=2", "val_every=2", "checkpoint_every=2", "loader.val_tokens=4096", "trainer=cpu",
       "trainer.precision=bf16-mixed", "callbacks.samples=null"]  # fmt: skip
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
OPTIMIZERS = ("adamw", "muon", "lion", "tiger")


def forecast(overrides: list[str]) -> float:
    """Return the total of the plan in bytes."""
    command = [sys.executable, "train.py", *overrides, "plan=true"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    number, unit = re.findall(r"^\s*all\s+([\d.,_]+) (\w+)", text, re.MULTILINE)[0]
    return float(number.replace(",", "").replace("_", "")) * UNITS[unit]


def peak(overrides: list[str]) -> float:
    """Return the peak resident size of a run in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *overrides, f"hydra.run.dir={folder}/run"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return usage.ru_maxrss * 1024.0


def main() -> None:
    """Measure every case, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=OPTIMIZERS, help="optimizers")
    parser.add_argument("--models", nargs="+", default=["dense"], help="options of `model`")
    parser.add_argument("overrides", nargs="*", help="for every run")
    arguments = parser.parse_args()
    print("| model | optimizer | forecast, MiB | measured, MiB | forecast / measured |\n|---|---|---|---|---|")
    for model in arguments.models:
        for name in arguments.cases:
            overrides = [*RUN, f"model={model}", f"optimizer={name}", *arguments.overrides]
            told, measured = forecast(overrides), peak(overrides)
            cells = [model, name, f"{told / 2**20:.0f}", f"{measured / 2**20:.0f}", f"{told / measured:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
