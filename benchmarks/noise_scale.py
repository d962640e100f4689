"""What does measuring the noise scale cost? The seconds inside the callback, over those of the same updates.

    python benchmarks/noise_scale.py --sizes tiny,small --updates 20

Each run trains as `python train.py callbacks=noise_scale` does, with the update cut into `--parts` micro-batches.
Printed is the median share over the updates after the first five. On a GPU the callback waits for the update that it
measures, so that the share there is an upper bound.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from grid import composed
from lightning.pytorch.callbacks import Callback

from llm.callbacks.noise_scale import NoiseScale
from llm.tables import format_table
from llm.training import module_and_trainer
from llm.training.train import train

WARM_UP = 5
TIMED = ("_take", "on_before_optimizer_step", "on_train_batch_end", "step_metrics")


class Watch(Callback):
    """Notes how long each update took, and how much of it was the callback's."""

    def __init__(self) -> None:
        self.inside, self.updates, self._began, self._step = 0.0, list[tuple[float, float]](), 0.0, 0
        for name in TIMED:
            setattr(NoiseScale, name, self._timed(getattr(NoiseScale, name)))

    def _timed(self, function: Any) -> Any:
        """Add what a call takes to what was spent inside."""

        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.inside += time.perf_counter() - began

        return call

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Close an update."""
        if trainer.global_step == self._step:
            return
        now = time.perf_counter()
        self.updates.append((now - self._began, self.inside))
        self._began, self.inside, self._step = now, 0.0, trainer.global_step


def measure(size: str, parts: int, updates: int, folder: Path, further: list[str]) -> tuple[float, float]:
    """Return seconds per update, and the share of it that the callback takes: medians."""
    length = [f"max_steps={updates}", f"val_every={updates}", f"checkpoint_every={updates}"]
    quiet = ["callbacks.samples=null", "callbacks.curves=null"]
    cfg = composed([f"model/size={size}", "callbacks=noise_scale", *length, *quiet, *further])
    cfg["micro_batch_size"] = cfg["batch_tokens"] // cfg["context_length"] // parts
    plain, methods = module_and_trainer.build_callbacks, {name: getattr(NoiseScale, name) for name in TIMED}
    watch = Watch()
    module_and_trainer.build_callbacks = lambda *a, **k: [*plain(*a, **k), watch]
    try:
        train(cfg, folder)
    finally:
        module_and_trainer.build_callbacks = plain
        for name, method in methods.items():
            setattr(NoiseScale, name, method)
    kept = watch.updates[WARM_UP:-1]  # the last has the validation in it
    return statistics.median(whole for whole, _ in kept), statistics.median(part / whole for whole, part in kept)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,small")
    parser.add_argument("--parts", default="2,8", help="micro-batches per update")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("override", nargs="*", help="further overrides for every run")
    arguments = parser.parse_args()
    rows = []
    for size in arguments.sizes.split(","):
        for parts in map(int, arguments.parts.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                seconds, share = measure(size, parts, arguments.updates, Path(folder), arguments.override)
            rows.append([size, str(parts), f"{seconds:.2f}", f"{share:.2%}"])
    print(format_table(["model/size", "micro-batches", "seconds per update", "of them measuring"], rows))


if __name__ == "__main__":
    main()
