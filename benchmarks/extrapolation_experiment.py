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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from llm.commands.evaluate import subject_of
from llm.evals.evaluation import Subject
from llm.evals.extrapolation import Extrapolation, long_windows, loss_by_position
from llm.model.position.ntk import NTKMixedRoPE, NTKRoPE
from llm.model.position.position_module import Position
from llm.model.position.rerope import LeakyReRoPE, ReRoPE
from llm.model.position.rope import RoPE
from llm.training.rebuild import rebuild

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


def use_position(model: nn.Module, position: Position) -> None:
    """Replace the position of all layers."""
    model.position = position
    for layer in model.layers:
        layer.attention.position = position


def by_context(subject: Subject, windows: Tensor, train_length: int) -> dict[int, tuple[float, float]]:
    """Return the mean loss of the last tokens and its standard error over windows, by length of context."""
    measure = Extrapolation(factors=list(FACTORS), last=LAST, windows=len(windows))
    return {f * train_length: measure.loss_by_context(subject, windows, f * train_length) for f in FACTORS}


def evaluate(arguments: argparse.Namespace) -> dict[str, dict]:
    """Return both measures for every position and model."""
    run = rebuild(arguments.rope, "last")
    train_length = run.config.tree["context_length"]
    windows = long_windows(subject_of(run), FACTORS[-1] * train_length, arguments.windows)
    print(f"{len(windows)} windows of {windows.shape[1] - 1} bytes")
    position = run.config.tree["model"]["position"]
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
        window = vq.config.tree["model"]["position"]["window"]
        sharp = ReRoPE(**plain, window=window, log_n="clipped", train_length=train_length)
        jobs.append(("trained with vq and rerope, log-n", vq, sharp))
    results = {}
    for name, judged, other in jobs:
        model = judged.module.model.float().cpu().eval()
        use_position(model, other)
        subject = replace(subject_of(judged), model=model, precision="32-true")
        results[name] = {
            "by_context": by_context(subject, windows, train_length),
            "by_position": loss_by_position(subject, windows, stretch=train_length // 2),
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

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 5), layout="constrained")
    for name, color in zip(names, plt.cm.tab20.colors, strict=False):
        points = results[name]["by_context"]
        left.plot(list(points), [loss for loss, _ in points.values()], marker="o", color=color, label=name)
        curve = results[name]["by_position"]
        right.plot([(i + 0.5) * stretch for i in range(len(curve))], curve, color=color)
    left.set_xscale("log", base=2)
    left.set_xticks(list(points), [str(n) for n in points])
    left.set(xlabel="bytes of context", ylabel=f"loss of the last {LAST} bytes, nats", title="By context")
    right.set(xlabel="position in one read", ylabel="loss, nats", title="By position")
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Evaluate, then print and save the results."""
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
