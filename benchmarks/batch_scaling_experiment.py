"""Which rule carries a learning rate from one batch to another, for which optimizer?

    python benchmarks/batch_scaling_experiment.py --out runs/batch_scaling --docs docs/batch_scaling

Every run is `experiment=batch_scaling`: one model, one corpus, one number of tokens whatever the batch. For each
optimizer and batch the learning rates of a grid of factors of 2 are walked until the lowest validation loss has a
higher one on both sides; the three rates around it then run with further seeds. The best rate and its loss are the
vertex of the parabola through those three. From the best rate at the base batch, and the noise scale measured in a run
there, each rule predicts the rate at the other batches; its regret is the loss at that rate, between measured rates by
interpolation, over the best loss there. Beyond the measured rates the last loss counts, as a lower bound.

Finished runs are kept in OUT and not repeated, so an interrupted sweep continues where it stopped.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from grid import Curve, composed, index_of, loss_at, loss_of, lowest, rate_of, run, vertex, walk
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llm.config.pieces import piece_at
from llm.scaling.momentum import equivalent_momentum
from llm.scaling.rules import adam, adam_eps, linear, none, sign, sqrt, variance

EXPERIMENT = "experiment=batch_scaling"
PARTS = 4
"""Micro-batches per update in the run that measures the noise scale."""


def rules(base: int, noise_scale: float, optimizer: str) -> dict[str, Callable[[int], float]]:
    """Return the rules that are compared, as functions of the batch alone; with momentum and, as of 0.1, without."""
    noisy = {"base_batch_tokens": base, "noise_scale": noise_scale}
    node = composed([EXPERIMENT, f"optimizer={optimizer}"])["optimizer"]
    own = {**noisy, "momentum": equivalent_momentum(piece_at(node["_target_"]), node)}
    return {
        "adam, own momentum": partial(adam, **own, alignment=1.0),
        "sign, own momentum": partial(sign, **own, alignment=1.0),
        "variance, own momentum": partial(variance, **own),
        "adam_eps, own momentum": partial(adam_eps, **own, alignment=1.0, eps_to_gradient=1.0),
        "none": partial(none, base_batch_tokens=base),
        "linear": partial(linear, base_batch_tokens=base),
        "sqrt": partial(sqrt, base_batch_tokens=base),
        "variance": partial(variance, **noisy),
        "sign": partial(sign, **noisy, alignment=1.0),
        "sign, peak": partial(sign, **noisy, alignment=3.0),
        "adam_eps": partial(adam_eps, **noisy, alignment=1.0, eps_to_gradient=1.0),
    }


def overrides(optimizer: str, batch: int, index: float, seed: int, further: list[str]) -> list[str]:
    """Return the command line of one run."""
    base = composed([EXPERIMENT, *further])
    updates = base["max_tokens"] // batch
    sizes = [f"batch_tokens={batch}", f"micro_batch_size={min(batch, 8192) // base['context_length']}"]
    times = [f"val_every={updates}", f"checkpoint_every={updates}"]
    return [
        EXPERIMENT,
        f"optimizer={optimizer}",
        f"optimizer.lr={rate_of(index)}",
        f"seed={seed}",
        *sizes,
        *times,
        *further,
    ]


def curves_of(arguments: argparse.Namespace, optimizer: str, batch: int, start: int) -> dict[int, Curve]:
    """Return the losses by rate of each seed: the whole walk of seed 0, three rates of the others."""

    def measure(index: int, seed: int = 0) -> float:
        folder = arguments.out / f"{optimizer}_batch{batch}_rate{index:+d}_seed{seed}"
        return loss_of(run(folder, overrides(optimizer, batch, index, seed, arguments.override)))

    curves = {0: walk(start, measure)}
    best = lowest(curves[0])
    for seed in range(1, arguments.seeds):
        curves[seed] = {index: measure(index, seed) for index in (best - 1, best, best + 1)}
    return curves


def completed(curves: dict[int, Curve]) -> dict[int, Curve]:
    """Give each seed a whole curve: where it has no run, that of seed 0, moved by their mean difference."""
    whole = {0: curves[0]}
    for seed, curve in curves.items():
        shift = statistics.mean([loss - curves[0][i] for i, loss in curve.items() if math.isfinite(loss)] or [0.0])
        whole[seed] = {i: curve.get(i, loss + shift) for i, loss in curves[0].items()}
    return whole


def measured_noise_scale(arguments: argparse.Namespace, optimizer: str, index: int) -> float:
    """Return the median noise scale over a run at the base batch with its best rate, from the metrics of the run."""
    folder = arguments.out / f"{optimizer}_noise_scale"
    further = [*arguments.override, "callbacks=noise_scale", "callbacks.samples=null", "callbacks.curves=null"]
    line = overrides(optimizer, arguments.base, index, 0, further)
    context = composed([EXPERIMENT, *arguments.override])["context_length"]
    run(folder, [*line, f"micro_batch_size={arguments.base // context // PARTS}"])
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    values = [row["noise_scale"] for row in rows if row.get("noise_scale")]
    return statistics.median(values[len(values) // 10 :])


def study(arguments: argparse.Namespace, optimizer: str) -> dict[str, Any]:
    """Measure one optimizer at every batch, and compare it with the prediction of every rule."""
    sizes = sorted(arguments.batches, key=lambda b: abs(math.log(b / arguments.base)))
    start = round(index_of(composed([EXPERIMENT, f"optimizer={optimizer}"])["optimizer"]["lr"]))
    curves: dict[int, dict[int, Curve]] = {}
    for batch in sizes:
        if curves:
            near = min(curves, key=lambda b: abs(math.log(b / batch)))
            start = lowest(curves[near][0]) + round(0.5 * math.log2(batch / near))
        curves[batch] = completed(curves_of(arguments, optimizer, batch, start))
        print(
            optimizer, batch, {f"{rate_of(i):.2g}": round(loss, 4) for i, loss in curves[batch][0].items()}, flush=True
        )
    noise_scale = measured_noise_scale(arguments, optimizer, lowest(curves[arguments.base][0]))
    best = {b: {s: vertex(c) for s, c in by_seed.items()} for b, by_seed in curves.items()}
    return {
        "noise_scale": noise_scale,
        "curves": {
            b: {s: {rate_of(i): x for i, x in c.items()} for s, c in by.items()} for b, by in sorted(curves.items())
        },
        "best_lr": {b: [rate_of(i) for i, _ in by_seed.values()] for b, by_seed in sorted(best.items())},
        "best_loss": {b: [loss for _, loss in by_seed.values()] for b, by_seed in sorted(best.items())},
        "exponent": exponent(best),
        "regret": regrets_of_rules(curves, best, arguments.base, noise_scale, optimizer),
    }


def regrets_of_rules(
    curves: dict[int, dict[int, Curve]],
    best: dict[int, dict[int, tuple[float, float]]],
    base: int,
    noise_scale: float,
    optimizer: str,
) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the regret of every rule at every batch but the base."""
    return {
        name: {b: regrets(curves[b], best, rule(b), base, b) for b in sorted(curves) if b != base}
        for name, rule in rules(base, noise_scale, optimizer).items()
    }


def judged_again(kept: dict[str, Any], base: int) -> dict[str, Any]:
    """Return kept results with the regrets of today's rules, from the kept losses: no run is repeated."""
    results = {}
    for optimizer, found in kept.items():
        curves = {
            int(b): {int(s): {round(index_of(float(rate))): x for rate, x in c.items()} for s, c in by.items()}
            for b, by in found["curves"].items()
        }
        best = {b: {s: vertex(c) for s, c in by_seed.items()} for b, by_seed in curves.items()}
        results[optimizer] = {
            **found,
            "curves": {
                b: {s: {rate_of(i): x for i, x in c.items()} for s, c in by.items()} for b, by in curves.items()
            },
            **{key: {int(b): v for b, v in found[key].items()} for key in ("best_lr", "best_loss")},
            "regret": regrets_of_rules(curves, best, base, found["noise_scale"], optimizer),
        }
    return results


def exponent(best: dict[int, dict[int, tuple[float, float]]]) -> list[float]:
    """Return p of the fit best lr ∝ B^p, for each seed."""
    sizes = np.log2(list(best))
    return [float(np.polyfit(sizes, [best[b][seed][0] for b in best], 1)[0]) for seed in next(iter(best.values()))]


def regrets(
    curves: dict[int, Curve], best: dict[int, dict[int, tuple[float, float]]], scale: float, base: int, batch: int
) -> dict[str, Any]:
    """Return the loss at the predicted rate minus the best, for each seed, and whether that is a lower bound."""
    losses, is_bound = [], False
    for seed, curve in curves.items():
        loss, outside = loss_at(curve, best[base][seed][0] + math.log2(scale))
        losses.append(loss - best[batch][seed][1])
        is_bound |= outside
    return {"by_seed": losses, "lower_bound": is_bound, "lr_scale": scale}


def table(results: dict[str, Any], base: int) -> str:
    """Return best rates and regrets as Markdown."""
    lines = []
    for name, result in results.items():
        sizes = [b for b in result["best_lr"] if b != base]
        p = result["exponent"]
        lines += [
            f"### {name}: noise scale {result['noise_scale']:,.0f} tokens, best lr ∝ B^{statistics.mean(p):.2f} "
            f"({min(p):.2f} to {max(p):.2f})",
            "",
            "| tokens per update | " + " | ".join(f"{b:,}" for b in result["best_lr"]) + " | mean regret |",
            "|---" * (len(result["best_lr"]) + 2) + "|",
            "| best lr | "
            + " | ".join(f"{statistics.geometric_mean(v):.2g}" for v in result["best_lr"].values())
            + " | |",
            "| best loss | " + " | ".join(f"{statistics.mean(v):.3f}" for v in result["best_loss"].values()) + " | |",
        ]
        means = {rule: statistics.mean(np.mean(r[b]["by_seed"]) for b in sizes) for rule, r in result["regret"].items()}
        for rule, by_batch in result["regret"].items():
            cells = ["base" if b == base else _cell(by_batch[b]) for b in result["best_lr"]]
            mean = f"{means[rule]:.3f}"
            lines.append(
                f"| {rule} | "
                + " | ".join(cells)
                + f" | {f'**{mean}**' if means[rule] == min(means.values()) else mean} |"
            )
        lines.append("")
    return "\n".join(lines)


def _cell(regret: dict[str, Any]) -> str:
    values = regret["by_seed"]
    mark = ">= " if regret["lower_bound"] else ""
    return f"{mark}{statistics.mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def picture(results: dict[str, Any], base: int, path: Path) -> None:
    """Draw one panel per optimizer: best lr over batch, measured rates coloured by regret, and a line per rule."""
    figure = Figure(figsize=(4.4 * len(results), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        points = [
            (b, lr, loss - statistics.mean(result["best_loss"][b]))
            for b, by_seed in result["curves"].items()
            for lr, loss in by_seed[0].items()
            if math.isfinite(loss)
        ]
        xs, ys, excess = zip(*points, strict=True)
        image = axes.scatter(xs, ys, c=excess, cmap="viridis_r", vmin=0, vmax=0.3, s=60, zorder=2)
        start = statistics.geometric_mean(result["best_lr"][base])
        sizes = np.geomspace(min(xs), max(xs), 50)
        for rule, scale in rules(base, result["noise_scale"], name).items():
            axes.plot(sizes, [start * scale(round(b)) for b in sizes], label=rule, linewidth=1.2, zorder=1)
        means = [statistics.geometric_mean(v) for v in result["best_lr"].values()]
        spread = [
            [m - min(v) for m, v in zip(means, result["best_lr"].values(), strict=True)],
            [max(v) - m for m, v in zip(means, result["best_lr"].values(), strict=True)],
        ]
        axes.errorbar(
            list(result["best_lr"]), means, yerr=spread, fmt="kx", capsize=4, label="best, range of seeds", zorder=3
        )
        axes.axvline(result["noise_scale"], color="grey", linestyle=":", linewidth=1)
        axes.set(xscale="log", yscale="log", title=name, xlabel="tokens per update")
        axes.set_ylim(min(ys) / 2, max(ys) * 2)
    panels[0].set_ylabel("learning rate")
    panels[0].legend(fontsize=7)
    figure.colorbar(image, ax=list(panels), label="loss over the best at the batch")  # pyright: ignore[reportPossiblyUnbound]
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, write table, plot and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the runs")
    parser.add_argument("--docs", type=Path, required=True, help="folder of table.md, rates.png and results.json")
    parser.add_argument("--optimizers", default="adamw,lion,muon,sgd")
    parser.add_argument("--batches", default="512,2048,8192,16384", type=lambda text: [int(b) for b in text.split(",")])
    parser.add_argument("--base", type=int, default=2048, help="batch that the rules predict from")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--recompute", action="store_true", help="judge the rules again from DOCS/results.json")
    parser.add_argument("override", nargs="*", help="further overrides for every run")
    arguments = parser.parse_args()
    arguments.docs.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    if arguments.recompute:
        kept = json.loads((arguments.docs / "results.json").read_text())
        results = judged_again(kept, arguments.base)
        (arguments.docs / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.docs / "table.md").write_text(table(results, arguments.base))
        picture(results, arguments.base, arguments.docs / "rates.png")
        print(table(results, arguments.base))
        return
    if arguments.out is None:
        parser.error("--out: needs a folder of runs")
    for optimizer in arguments.optimizers.split(","):
        results[optimizer] = study(arguments, optimizer)
        (arguments.docs / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.docs / "table.md").write_text(table(results, arguments.base))
        picture(results, arguments.base, arguments.docs / "rates.png")
    print(table(results, arguments.base))


if __name__ == "__main__":
    main()
