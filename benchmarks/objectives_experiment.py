"""How far do objectives lie apart at equal tokens, each at its best learning rate?

    python train.py -m experiment=objectives objective=next_token,masked,uniform,flow optimizer.lr=1e-3,3e-3,1e-2 seed=0
    python train.py -m experiment=objectives objective=masked optimizer.lr=3e-3 seed=1,2      # each at its best rate
    python eval.py run_dir=[<runs at the best rates>] eval=[bound]
    python benchmarks/objectives_experiment.py multirun/* --out docs/objectives

The rate with the lowest val/loss on the first seed is the best. Bits per byte are those of `eval=bound`.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def read_runs(sweeps: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """Return the finished runs of sweeps by objective."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(path for sweep in sweeps for path in sweep.glob("*/summary.json")):
        summary, config = json.loads(path.read_text()), yaml.safe_load((path.parent / "config.yaml").read_text())
        if summary.get("status") != "finished":
            continue
        settings, bound = config["objective"], path.parent / "eval" / "bound.json"
        name = settings["_target_"].split(".")[-2].removesuffix("_diffusion").removeprefix("token_")
        name += f" {settings['block_length']}" if "block_length" in settings else ""
        run = {"lr": config["optimizer"]["lr"], "seed": config["seed"], "loss": summary["val/loss"]}
        run |= {"flops": summary["flops_per_token"], "speed": summary["tokens_per_second"]}
        run["bound"] = json.loads(bound.read_text()) if bound.is_file() else None
        found.setdefault(name, []).append(run)
    return found


def at_best_rate(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the evaluated runs at the rate with the lowest loss on the first seed."""
    first = min(run["seed"] for run in runs)
    best = min((run for run in runs if run["seed"] == first), key=lambda run: run["loss"])["lr"]
    return [run for run in runs if run["lr"] == best and run["bound"]]


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table of objectives, the lowest bits per byte first."""
    chosen = {name: at_best_rate(runs) for name, runs in found.items()}
    base = found["next_token"][0]["flops"]
    lines = [
        "| objective | best rate | bits per byte, mean | s.d. over seeds | seeds | Monte Carlo error, nats | FLOPs |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    means = {name: statistics.fmean(run["bound"]["bits_per_byte"] for run in runs) for name, runs in chosen.items()}
    for name in sorted(means, key=means.__getitem__):
        runs = chosen[name]
        bits = [run["bound"]["bits_per_byte"] for run in runs]
        sign = "<= " if runs[0]["bound"]["is_bound"] else ""
        spread = f"{statistics.stdev(bits):.3f}" if len(bits) > 1 else "–"
        error = max(run["bound"]["monte_carlo_error"] for run in runs)
        lines.append(
            f"| `{name}` | {runs[0]['lr']:g} | {sign}{means[name]:.3f} | {spread} | {len(bits)} | {error:.3f} "
            f"| {runs[0]['flops'] / base:.2f} |"
        )
    return "\n".join(lines)


def picture(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw val/loss over the rate, and the bits per byte of every seed."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    rates, bits = figure.subplots(1, 2)
    for place, (name, runs) in enumerate(found.items()):
        first = min(run["seed"] for run in runs)
        curve = sorted((run["lr"], run["loss"]) for run in runs if run["seed"] == first)
        rates.plot(*zip(*curve, strict=True), "o-", markersize=4, label=name)
        own = [run["bound"]["bits_per_byte"] for run in at_best_rate(runs)]
        bits.plot([place] * len(own), own, "o", markersize=5)
    rates.set(xscale="log", xlabel="learning rate", ylabel="val/loss, nats per token", title="Rates, first seed")
    bits.set(ylabel="bits per byte, upper bound but for next_token", title="Seeds at the best rate")
    bits.set_xticks(range(len(found)), list(found), fontsize=8)
    rates.legend(fontsize=8)
    for axes in (rates, bits):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the sweeps, then print and save the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = read_runs(arguments.sweeps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / "table.md").write_text(table(found) + "\n")
    picture(found, arguments.out / "plot.png")
    print(table(found))


if __name__ == "__main__":
    main()
