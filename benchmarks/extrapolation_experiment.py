"""Does a model trained at a short length read longer text, and under which position?

    python train.py experiment=extrapolation hydra.run.dir=runs/extrapolation-rope
    python train.py experiment=extrapolation model/position=inv_leaky model.position.window=32 \\
        model.position.train_length=128 hydra.run.dir=runs/extrapolation-inv-leaky
    python train.py experiment=extrapolation model/attention=vq model/position=rerope model.position.window=32 \\
        model.attention.block_size=32 hydra.run.dir=runs/extrapolation-vq
    python benchmarks/extrapolation_experiment.py runs/extrapolation-rope --inv-leaky runs/extrapolation-inv-leaky \\
        --vq runs/extrapolation-vq --out docs/extrapolation

The loss is that of the same last tokens of long held-out documents, given 1x to 16x the training length of context
before them; positions count from the start of the context. The second table is the loss by position in one long read.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llm.evaluation import TrainedRun, rebuild
from llm.loss import linear_cross_entropy
from llm.position.base import Position
from llm.position.ntk import NTKMixedRoPE, NTKRoPE
from llm.position.rerope import LeakyReRoPE, ReRoPE
from llm.position.rope import RoPE

FACTORS = (1, 2, 4, 8, 16)
LAST = 64
"""Tokens whose loss is compared: the last of each context."""


def positions(base: float, head_dim: int, train_length: int) -> dict[str, Position]:
    """Return the positions under which the model trained with RoPE is evaluated."""
    plain = {"head_dim": head_dim, "base": base, "log_n": "none", "train_length": None}
    sharp = plain | {"log_n": "clipped", "train_length": train_length}
    half = train_length // 2
    return {
        "rope": RoPE(**plain),
        "rope, log-n": RoPE(**sharp),
        "ntk, factor 8": NTKRoPE(**plain, factor=8.0),
        "ntk, factor 8, log-n": NTKRoPE(**sharp, factor=8.0),
        "ntk_mixed, factor 8": NTKMixedRoPE(**plain, factor=8.0, exponent=0.625),
        "ntk_mixed, factor 8, log-n": NTKMixedRoPE(**sharp, factor=8.0, exponent=0.625),
        f"rerope, window {half}": ReRoPE(**plain, window=half),
        f"rerope, window {half}, log-n": ReRoPE(**sharp, window=half),
        f"rerope, window {train_length * 3 // 4}, log-n": ReRoPE(**sharp, window=train_length * 3 // 4),
        f"leaky_rerope, window {half}, slowdown 16": LeakyReRoPE(**plain, window=half, slowdown=16.0),
        f"leaky_rerope, window {half}, slowdown 16, log-n": LeakyReRoPE(**sharp, window=half, slowdown=16.0),
    }


def long_windows(run: TrainedRun, length: int, count: int) -> Tensor:
    """Return stretches of held-out documents, [count, length + 1] ids, spread over all that are long enough."""
    stream, bos = run.data.cache.val, run.data.tokenizer.bos_id
    ids = np.asarray(stream.read(0, len(stream))).astype(np.int64)
    starts = np.flatnonzero(ids == bos)
    ends = np.append(starts[1:], len(ids))
    rows = [
        ids[stop - length - 1 : stop]
        for start, end in zip(starts, ends, strict=True)
        for stop in range(end, start + length + 1, -length)
    ]
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    print(f"{len(chosen)} windows of {len(rows)} in documents of more than {length} bytes")
    return torch.from_numpy(np.stack([rows[i] for i in chosen]))


def use_position(model: nn.Module, position: Position) -> None:
    """Put another position in all layers."""
    model.position = position
    for layer in model.layers:
        layer.attention.position = position


@torch.no_grad()
def losses(model: nn.Module, windows: Tensor, rows: int) -> Tensor:
    """Return the loss of every token of every window, [windows, length]."""
    answer = []
    for part in windows.split(rows):
        places = torch.arange(part.shape[1] - 1).expand(len(part), -1)
        hidden = model(part[:, :-1], positions=places).hidden
        answer.append(linear_cross_entropy(hidden, model.lm_head.weight, part[:, 1:], reduction="none"))
    return torch.cat(answer).view(len(windows), -1)


def by_context(model: nn.Module, windows: Tensor, train_length: int) -> dict[int, tuple[float, float]]:
    """Return the mean loss of the last tokens and its standard error over windows, by length of context."""
    table = {}
    for factor in FACTORS:
        length = factor * train_length
        loss = losses(model, windows[:, -length - 1 :], max(1, 4096 // length))[:, -LAST:].mean(1)
        table[length] = (float(loss.mean()), float(loss.std() / math.sqrt(len(loss))))
    return table


def by_position(model: nn.Module, windows: Tensor, train_length: int) -> list[float]:
    """Return the mean loss in consecutive stretches of half the training length, in one read of the longest context."""
    loss = losses(model, windows, 2).mean(0)
    return [float(part.mean()) for part in loss.split(train_length // 2)]


def evaluate(arguments: argparse.Namespace) -> dict[str, dict]:
    """Return both measures for every position and model."""
    run = rebuild(arguments.rope, "last")
    train_length = run.config["context_length"]
    windows = long_windows(run, FACTORS[-1] * train_length, arguments.windows)
    position = run.config["model"]["position"]
    head_dim = run.module.model.layers[0].attention.head_dim
    jobs = [(f"{name}", run, other) for name, other in positions(position["base"], head_dim, train_length).items()]
    plain = {"head_dim": head_dim, "base": position["base"]}
    if arguments.inv_leaky:
        inverse = rebuild(arguments.inv_leaky, "last")
        jobs.append(("trained with inv_leaky, as trained", inverse, inverse.module.model.position))
        rope = RoPE(**plain, log_n="full", train_length=train_length)
        jobs.append(("trained with inv_leaky, read with rope", inverse, rope))
    if arguments.vq:
        vq = rebuild(arguments.vq, "last")
        jobs.append(("trained with vq and rerope", vq, vq.module.model.position))
        window = vq.config["model"]["position"]["window"]
        sharp = ReRoPE(**plain, window=window, log_n="clipped", train_length=train_length)
        jobs.append(("trained with vq and rerope, log-n", vq, sharp))
    results = {}
    for name, judged, other in jobs:
        model = judged.module.model.float().cpu().eval()
        use_position(model, other)
        results[name] = {
            "by_context": by_context(model, windows, train_length),
            "by_position": by_position(model, windows, train_length),
        }
        print(name, {n: round(loss, 4) for n, (loss, _) in results[name]["by_context"].items()}, flush=True)
    return results


def table(results: dict[str, dict]) -> str:
    """Return the loss by context as Markdown."""
    lengths = list(next(iter(results.values()))["by_context"])
    lines = ["| evaluated under |" + "".join(f" {n} |" for n in lengths), "|---|" + "---|" * len(lengths)]
    for name, result in results.items():
        lines.append(f"| {name} |" + "".join(f" {result['by_context'][n][0]:.3f} |" for n in lengths))
    error = max(e for result in results.values() for _, e in result["by_context"].values())
    return "\n".join(lines) + f"\n\nStandard error over windows: at most {error:.3f} nats.\n"


def plot(results: dict[str, dict], path: Path, names: Sequence[str], stretch: int) -> None:
    """Draw the loss over the context, and over the position in one long read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for name in names:
        points = results[name]["by_context"]
        left.plot(list(points), [loss for loss, _ in points.values()], marker="o", label=name)
        curve = results[name]["by_position"]
        right.plot([(i + 0.5) * stretch for i in range(len(curve))], curve, label=name)
    left.set_xscale("log", base=2)
    left.set_xticks(list(points), [str(n) for n in points])
    left.set(xlabel="bytes of context", ylabel=f"loss of the last {LAST} bytes, nats", title="By context")
    right.set(xlabel="position in one read", ylabel="loss, nats", title="By position")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Evaluate, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rope", type=Path, help="run folder of the model trained with rope")
    parser.add_argument("--inv-leaky", type=Path)
    parser.add_argument("--vq", type=Path)
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True, help="folder for the table, the plot and the figures")
    arguments = parser.parse_args()
    results = evaluate(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "table.md").write_text(table(results))
    shown = [name for name in results if name.split(",")[0] in ("rope", "ntk") or "log-n" in name or "trained" in name]
    stretch = next(iter(results.values()))["by_context"]
    plot(results, arguments.out / "plot.png", shown, next(iter(stretch)) // 2)
    print(table(results))


if __name__ == "__main__":
    main()
