"""Does the learning rate of a narrow model serve a wide one, with and without rates that depend on the width?

    python benchmarks/width_transfer_experiment.py --out runs/width_transfer --docs docs/width_transfer
    python benchmarks/width_transfer_experiment.py --docs docs/width_transfer --coordinate-check

Every run is `experiment=width_transfer` at one of four widths, depth, head size and d_ff / d_model held. For each
optimizer, width and kind of rates the learning rates of a grid of factors of 2 are walked until the lowest validation
loss has a higher one on both sides; the optimum is the vertex of the parabola through those three, and its geometric
mean over seeds. At the base width all rates but `spectral` are the plain ones. Finished runs are kept in OUT and not
repeated.

The coordinate check trains a few updates on one batch and compares, from width 64 to 1024, how far each layer's
activations and scores moved: rates that account for the width keep them at one size.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grid import Curve, composed, index_of, loss_of, lowest, rate_of, run, vertex, walk
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llm.config.build import build_model, module_factories
from llm.config.sizes import batch_ramp
from llm.ops.loss import linear_cross_entropy
from llm.training.learning_rate import rated_groups

EXPERIMENT = "experiment=width_transfer"
HEAD_DIM = 16
CHECK_UPDATES = 4


def overrides(optimizer: str, rates: str, width: int, base: int) -> list[str]:
    """Return the choices of one model."""
    heads = width // HEAD_DIM
    shape = [f"model.d_model={width}", f"model.num_heads={heads}", f"model.num_kv_heads={heads}"]
    known = [f"rates={rates}"] + ([] if rates == "plain" else [f"rates.base_d_model={base}"])
    return [EXPERIMENT, f"optimizer={optimizer}", *shape, f"model.ffn.d_ff={2 * width}", *known]


def curve_of(arguments: argparse.Namespace, optimizer: str, rates: str, width: int, seed: int, start: int) -> Curve:
    """Walk the rates of one model."""

    def measure(index: int) -> float:
        folder = arguments.out / f"{optimizer}_{rates}_width{width}_rate{index:+d}_seed{seed}"
        line = [*overrides(optimizer, rates, width, arguments.widths[0]), f"seed={seed}"]
        return loss_of(run(folder, [*line, f"optimizer.lr={rate_of(index)}", *arguments.override]))

    return walk(start, measure)


def study(arguments: argparse.Namespace, optimizer: str) -> dict[str, Any]:
    """Find the best rate at every width, with each kind of rates and each seed."""
    start = round(index_of(composed([EXPERIMENT, f"optimizer={optimizer}"])["optimizer"]["lr"]))
    found: dict[str, dict[int, list[Curve]]] = {}
    for rates in arguments.rates:
        curves: dict[int, list[Curve]] = {}
        for width in arguments.widths:
            if width == arguments.widths[0] and rates == "mup" and "plain" in found:
                curves[width] = found["plain"][width]
            else:
                curves[width] = [curve_of(arguments, optimizer, rates, width, s, start) for s in arguments.seeds]
            start = lowest(curves[width][0])
            for curve in curves[width]:
                print(optimizer, rates, width, {f"{rate_of(i):.2g}": round(x, 4) for i, x in curve.items()}, flush=True)
        found[rates], start = curves, lowest(curves[arguments.widths[0]][0])
    return {
        rates: {
            "curves": {w: [{rate_of(i): x for i, x in c.items()} for c in cs] for w, cs in curves.items()},
            "best_lr": {w: [rate_of(vertex(c)[0]) for c in cs] for w, cs in curves.items()},
            "best_loss": {w: [vertex(c)[1] for c in cs] for w, cs in curves.items()},
            "shift": shift([statistics.mean(vertex(c)[0] for c in cs) for cs in curves.values()]),
        }
        for rates, curves in found.items()
    }


def shift(indices: list[float]) -> float:
    """Return the factor between the largest and the smallest best rate."""
    return 2.0 ** (max(indices) - min(indices))


def table(results: dict[str, Any], widths: list[int]) -> str:
    """Return the best rate at each width as Markdown."""
    lines = [
        "| optimizer | rates | " + " | ".join(f"best lr at {w}" for w in widths) + " | largest over smallest | loss at "
        f"{widths[-1]} |",
        "|---" * (len(widths) + 4) + "|",
    ]
    for optimizer, by_rates in results.items():
        for rates, r in by_rates.items():
            cells = " | ".join(spread_of(r["best_lr"][w]) for w in widths)
            loss = statistics.mean(r["best_loss"][widths[-1]])
            lines.append(f"| {optimizer} | {rates} | {cells} | {r['shift']:.2f} | {loss:.3f} |")
    return "\n".join(lines) + "\n"


def spread_of(rates: list[float]) -> str:
    """Return the geometric mean and the range over seeds."""
    return f"{statistics.geometric_mean(rates):.2g} ({min(rates):.2g} to {max(rates):.2g})"


def mean_curve(curves: list[dict[float, float]]) -> list[tuple[float, float]]:
    """Return the mean loss at every rate that all seeds have run to the end."""
    shared = sorted(set.intersection(*(set(c) for c in curves)))
    means = [(lr, statistics.mean(c[lr] for c in curves)) for lr in shared]
    return [(lr, loss) for lr, loss in means if math.isfinite(loss)]


def picture(results: dict[str, Any], widths: list[int], path: Path) -> None:
    """Draw loss over lr, one line per width, one row per optimizer, one column per kind of rates."""
    columns = list(next(iter(results.values())))
    figure = Figure(figsize=(3.6 * len(columns), 2.8 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(results), len(columns), squeeze=False, sharex="row", sharey="row")
    for row, (optimizer, by_rates) in zip(panels, results.items(), strict=True):
        lowest_loss = min(min(seeds) for one in by_rates.values() for seeds in one["best_loss"].values())
        for axes, rates in zip(row, columns, strict=True):
            for shade, width in zip(np.linspace(0.25, 1, len(widths)), widths, strict=True):
                points = mean_curve(by_rates[rates]["curves"][width])
                axes.plot(
                    *zip(*points, strict=True), "o-", color=(0.1, 0.3, 0.6, shade), markersize=3, label=str(width)
                )
            axes.set(xscale="log", title=f"{optimizer}, rates={rates}")
            axes.set_ylim(lowest_loss - 0.1, lowest_loss + 1.2)
    panels[0][0].legend(title="d_model", fontsize=7)
    figure.supxlabel("learning rate")
    figure.supylabel("validation loss")
    figure.savefig(path, dpi=110)


def movements(optimizer: str, rates: str, width: int, base: int) -> dict[str, float]:
    """Return the RMS by which each activation moved in a few updates on one batch, averaged over two draws."""
    found: dict[str, list[float]] = {}
    for seed in (0, 1):
        cfg = composed([*overrides(optimizer, rates, width, base), f"seed={seed}"])
        model, factories = build_model(cfg, vocab_size=256), module_factories(cfg, batch_ramp(cfg))
        rating = {key: factories[key] for key in ("rates", "optimizer", "lr", "weight_decay")}
        step = factories["optimizer"](rated_groups(model, **rating))
        ids = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(seed))
        before = activations(model, ids)
        for _ in range(CHECK_UPDATES):
            out = model(ids[:, :-1], positions=torch.arange(32).expand(4, -1))
            step.zero_grad()
            linear_cross_entropy(out.hidden, model.lm_head.weight, ids[:, 1:]).backward()
            step.step()
        for name, value in activations(model, ids).items():
            found.setdefault(name, []).append(float((value - before[name]).square().mean().sqrt()))
    return {name: statistics.mean(values) for name, values in found.items()}


@torch.no_grad()
def activations(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what each sublayer writes, and the scores."""
    seen: dict[str, torch.Tensor] = {}
    hooks = []
    for i, layer in enumerate(model.blocks()):
        for part in ("attention", "ffn"):
            keep = lambda _, __, out, name=f"{part} {i}": seen.update({name: out.hidden.clone()})  # noqa: E731
            hooks.append(getattr(layer, part).register_forward_hook(keep))
    hidden = model(ids[:, :-1], positions=torch.arange(32).expand(4, -1)).hidden
    for hook in hooks:
        hook.remove()
    return seen | {"scores": model.logits(hidden)}


def growth(values: dict[int, float]) -> float:
    """Return the exponent p of movement ∝ width^p."""
    widths = np.log(list(values))
    return float(np.polyfit(widths, np.log(list(values.values())), 1)[0])


def coordinate_check(arguments: argparse.Namespace) -> str:
    """Return the growth exponents of every activation as Markdown."""
    widths, lines, header = [64, 128, 256, 512, 1024], [], ""
    for optimizer in arguments.optimizers.split(","):
        for rates in arguments.rates:
            moved = {w: movements(optimizer, rates, w, widths[0]) for w in widths}
            names = list(moved[widths[0]])
            exponents = [growth({w: moved[w][name] for w in widths}) for name in names]
            header = "| optimizer | rates | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|"
            lines.append(f"| {optimizer} | {rates} | " + " | ".join(f"{e:+.2f}" for e in exponents) + " |")
            print(lines[-1], flush=True)
    return "\n".join([header, *lines]) + "\n"


def main() -> None:
    """Train the missing runs, then write tables, plot and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the runs")
    parser.add_argument("--docs", type=Path, required=True, help="folder of the tables, rates.png and results.json")
    parser.add_argument("--optimizers", default="adamw,lion,tiger,muon")
    parser.add_argument("--rates", default="plain,mup,spectral", type=lambda text: text.split(","))
    parser.add_argument("--seeds", default="0,1,2", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--widths", default="32,64,128,256", type=lambda text: [int(w) for w in text.split(",")])
    parser.add_argument("--coordinate-check", action="store_true")
    parser.add_argument("override", nargs="*", help="further overrides for every run")
    arguments = parser.parse_args()
    arguments.docs.mkdir(parents=True, exist_ok=True)
    if arguments.coordinate_check:
        (arguments.docs / "coordinates.md").write_text(coordinate_check(arguments))
        return
    results = {}
    for optimizer in arguments.optimizers.split(","):
        results[optimizer] = study(arguments, optimizer)
        (arguments.docs / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.docs / "table.md").write_text(table(results, arguments.widths))
        picture(results, arguments.widths, arguments.docs / "rates.png")
    print(table(results, arguments.widths))


if __name__ == "__main__":
    main()
