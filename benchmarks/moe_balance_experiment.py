"""Does balance without an auxiliary loss cost less than with one?

    python benchmarks/moe_balance_experiment.py --out runs/moe_balance --seeds 3

Trains `experiment=moe_balance` with each balancing rule and its dense counterpart of equal active width, once a seed,
leaving out runs that are finished, and writes table.md and results.json: the validation loss and its distance to no
balancing at the same seed, max_violation of an update (mean over the last hundred) and of those hundred together, and
the share of experts that had less than a tenth of an even load in them.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

LAST = 100
VARIANTS: dict[str, list[str]] = {
    "dense, equal active": ["model=dense", "~model.ffn.num_experts"],
    "none": ["model/ffn/balance=none"],
    "aux_loss 1e-3": ["model/ffn/balance=aux_loss", "model.ffn.balance.weight=1e-3"],
    "aux_loss 1e-2": ["model/ffn/balance=aux_loss", "model.ffn.balance.weight=1e-2"],
    "aux_loss 1e-1": ["model/ffn/balance=aux_loss", "model.ffn.balance.weight=1e-1"],
    "loss_free, sign": ["model/ffn/balance=loss_free"],
    "loss_free, rms": ["model/ffn/balance=loss_free", "model.ffn.balance.rule=rms"],
    "quantile": ["model/ffn/balance=quantile"],
    "quantile, decay 0.9": ["model/ffn/balance=quantile", "model.ffn.balance.decay=0.9"],
    "threshold, budget": ["model/ffn/router=threshold", "model/ffn/balance=budget"],
    "loss_free, unit outputs": ["model/ffn/balance=loss_free", "model.ffn.normalize_outputs=true"],
}


def run(folder: Path, overrides: list[str]) -> None:
    """Train once in a process of its own, unless it is done."""
    summary = folder / "summary.json"
    if summary.is_file() and json.loads(summary.read_text())["status"] == "finished":
        return
    resume = [f"resume={folder}"] if (folder / "checkpoints" / "last").exists() else []
    command = [sys.executable, "train.py", "experiment=moe_balance", *overrides, f"hydra.run.dir={folder}", *resume]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def read(folder: Path) -> dict[str, float]:
    """Return the measures of one run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measures = {"val/loss": json.loads((folder / "summary.json").read_text())["val/loss"]}
    names = [name for name in lines[-1] if name.endswith("/expert_load_global")]
    if names:
        loads = torch.tensor([[line[name] for name in names] for line in lines[-LAST:]])  # update, layer, expert
        even = loads.shape[-1]
        measures["batch"] = float((loads.amax(-1) * even - 1).mean())
        measures["global"] = float((loads.mean(0).amax(-1) * even - 1).mean())
        measures["starved"] = float((loads.mean(0) * even < 0.1).float().mean())
    return measures


def spread(values: list[float]) -> str:
    """Return mean and standard deviation as text."""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| balance | val/loss | minus none, same seed | MaxVio an update | MaxVio over 100 updates | starved experts |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        base = [row["val/loss"] for row in results.get("none", [])]
        losses = [row["val/loss"] for row in rows]
        distance = spread([a - b for a, b in zip(losses, base, strict=False)]) if base else ""
        cells = [name, spread(losses), distance]
        for key in ("batch", "global", "starved"):
            cells.append(f"{statistics.mean(row[key] for row in rows):.3f}" if key in rows[0] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", metavar="NAME", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("overrides", nargs="*", help="for every run")
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        for name in arguments.variants:
            folder = (arguments.out / f"{name.replace(',', '').replace(' ', '_')}-{seed}").resolve()
            run(folder, [*VARIANTS[name], f"seed={seed}", *arguments.overrides])
            results.setdefault(name, []).append(read(folder))
            (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            (arguments.out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
