"""For how long does saving a checkpoint block training: with a copy written by a thread, and written directly?

python benchmarks/checkpoint_stall.py --size 124m --rounds 5
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from llm.callbacks.checkpoint_io import FolderCheckpointIO
from llm.ops.allocator import keep_freed_memory
from llm.run_folder.checkpoint import save_checkpoint
from llm.run_folder.checkpoint_files import remove_checkpoint, step_folder
from llm.tables import format_table

PARAMETERS = {"tiny": 1_300_000, "small": 13_767_552, "124m": 123_587_328, "350m": 353_772_544}
COLUMNS = 768


def state_of(parameters: int) -> dict:
    """Return what AdamW's checkpoint of so many parameters holds: weights and two moments, in fp32."""
    tensors = {f"w{i}": torch.randn(2**22 // COLUMNS, COLUMNS) for i in range(max(1, round(parameters / 2**22)))}
    moments = {i: {"exp_avg": t.clone(), "exp_avg_sq": t.clone()} for i, t in enumerate(tensors.values())}
    return {"state_dict": tensors, "global_step": 1, "optimizer_states": [{"state": moments}]}


def seconds(task) -> float:
    """Return how long a task takes."""
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


def measure(state: dict, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Return seconds of each side, interleaved: blocked, until complete on the disk, and written directly."""
    checkpoint_io, found = FolderCheckpointIO(manifest={}), {"stall": [], "whole": [], "at once": []}
    training = {name: value for name, value in state.items() if name != "state_dict"}
    for step in range(rounds):
        path = step_folder(folder, 2 * step)
        stalled = seconds(lambda path=path: checkpoint_io.save_checkpoint(state, path))
        rest = seconds(checkpoint_io.writer.wait)
        found["stall"].append(stalled)
        found["whole"].append(stalled + rest)
        remove_checkpoint(path)
        path = step_folder(folder, 2 * step + 1)
        found["at once"].append(
            seconds(
                lambda path=path: save_checkpoint(
                    path, model_state=state["state_dict"], training_state=training, manifest={"step": 1}
                )
            )
        )
        remove_checkpoint(path)
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=sorted(PARAMETERS), default="124m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to be measured; default: the temporary one"
    )
    arguments = parser.parse_args()
    keep_freed_memory()  # as in training on a CPU: the second copy reuses the memory of the first
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(state_of(PARAMETERS[arguments.size]), Path(folder), arguments.rounds)
    rows = [
        [name, f"{1e3 * statistics.median(times):.0f}", f"{1e3 * min(times):.0f}-{1e3 * max(times):.0f}"]
        for name, times in found.items()
    ]
    print(format_table([f"{arguments.size}, ms", "median", "range"], rows))
    ratios = [a / b for a, b in zip(found["stall"], found["at once"], strict=True)]
    print(f"training waits {statistics.median(ratios):.3f} x as long as for a checkpoint written at once")


if __name__ == "__main__":
    main()
