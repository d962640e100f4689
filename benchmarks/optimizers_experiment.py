"""Which optimizer learns most from the same tokens, each at its best learning rate?

    python benchmarks/optimizers_experiment.py --out runs/optimizers
    python benchmarks/optimizers_experiment.py --out runs/variants --optimizers adamw,muon,hyperball,normuon,cautious \\
        --batch-tokens 1024 max_steps=300 batch_tokens=1024 micro_batch_size=8
    python benchmarks/optimizers_experiment.py --out runs/optimizers-batch --optimizers adamw,lion,tiger \\
        --batch-tokens 1024,4096,16384 --seeds 1

Every run is `experiment=optimizers`: one model, one order of data, one number of tokens whatever the batch. Learning
rates lie on one grid, factors of 2 from 1e-3; each optimizer starts from its default and walks the grid until the
lowest validation loss has a higher one on both sides (seed 0). The best rate then runs with further seeds. Finished
runs are kept in OUT and not repeated, so an interrupted sweep continues where it stopped.
"""

import argparse
import json
import math
import shutil
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from llm.config.check import check
from llm.config.files import to_plain
from llm.training.train import train

CONF = Path(__file__).resolve().parents[1] / "conf"
GRID_ORIGIN = 1e-3
VARIANTS = {
    "hyperball": ["optimizer=muon", "optimizer.hyperball=true", "optimizer.weight_decay=0", "optimizer.lr=3.2e-2"],
    "normuon": ["optimizer=muon", "optimizer.row_beta=0.95"],
    "cautious": ["optimizer=muon", "optimizer.cautious_decay=true"],
    "qk-clip": ["optimizer=muon", "qk_clip=15"],
    "muon-no-decay": ["optimizer=muon", "optimizer.weight_decay=0"],
}
"""Names that `--optimizers` takes beside the files of conf/optimizer, with their overrides."""
STEPS_EACH_WAY = 8
"""Largest distance of a search from an optimizer's default, in points of the grid: a factor of 256."""


def run(
    out: Path, optimizer: str, rate_index: int, seed: int, batch_tokens: int, overrides: list[str]
) -> dict[str, Any]:
    """Train once, or read the finished run of an earlier call: the summary, and validation loss by tokens seen."""
    chosen = choice_of(optimizer)
    folder = out / f"{optimizer}_batch{batch_tokens}_rate{rate_index:+d}_seed{seed}"
    if not _finished(folder):
        rate = GRID_ORIGIN * 2.0**rate_index
        with initialize_config_dir(str(CONF), version_base="1.3"):
            base = compose("train", ["experiment=optimizers", *chosen, "name=o", *overrides])
            tokens = base.max_steps * base.batch_tokens
            steps = [f"max_steps={tokens // batch_tokens}", f"checkpoint_every={tokens // batch_tokens}"]
            steps += [f"val_every={max(1, base.val_every * base.batch_tokens // batch_tokens)}"]
            choice = [*chosen, f"optimizer.lr={rate}", f"seed={seed}", f"batch_tokens={batch_tokens}"]
            micro = [f"micro_batch_size={min(base.micro_batch_size, batch_tokens // base.context_length)}"]
            cfg = to_plain(compose("train", ["experiment=optimizers", "name=o", *overrides, *choice, *steps, *micro]))
        check(cfg)
        shutil.rmtree(folder, ignore_errors=True)  # an unfinished run of an interrupted call
        folder.mkdir(parents=True)
        train(cfg, folder)
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["tokens_seen"], row["val/loss"]) for row in rows if "val/loss" in row]
    return {"loss": summary["val/loss"], "summary": summary, "curve": curve}


def choice_of(optimizer: str) -> list[str]:
    """Return the overrides of a variant, or of a file in conf/optimizer."""
    return VARIANTS.get(optimizer, [f"optimizer={optimizer}"])


def _finished(folder: Path) -> bool:
    path = folder / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def score(result: dict[str, Any]) -> float:
    """Return the validation loss, infinite where the run diverged."""
    return result["loss"] if isinstance(result["loss"], float) and math.isfinite(result["loss"]) else math.inf


def tune(start: int, measure: Any) -> tuple[int, dict[int, float]]:
    """Walk the grid from `start` to a rate that beats both its neighbours; return it and every measured loss."""
    losses = {start: measure(start)}
    best = start
    for _ in range(2 * STEPS_EACH_WAY):
        missing = [index for index in (best - 1, best + 1) if index not in losses]
        if not missing:
            break
        losses[missing[0]] = measure(missing[0])
        best = min(losses, key=lambda index: losses[index])
    return best, losses


def default_index(optimizer: str) -> int:
    """Return the point of the grid nearest to the optimizer's default rate."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        rate = compose("train", ["experiment=optimizers", *choice_of(optimizer), "name=o"]).optimizer.lr
    return round(math.log2(rate / GRID_ORIGIN))


def tokens_to_reach(curve: list[tuple[int, float]], target: float) -> float | None:
    """Return the tokens at which a curve of (tokens, loss) reaches `target`, linear between points, or None."""
    for (tokens, loss), (next_tokens, next_loss) in pairwise(curve):
        if next_loss <= target:
            share = (loss - target) / (loss - next_loss) if loss > target else 0.0
            return tokens + share * (next_tokens - tokens)
    return None


def compare(arguments: argparse.Namespace, batch_tokens: int) -> dict[str, Any]:
    """Tune every optimizer at one batch size, then repeat the best with further seeds."""
    results: dict[str, Any] = {}
    for optimizer in arguments.optimizers.split(","):

        def once(index: int, seed: int = 0, optimizer: str = optimizer) -> dict[str, Any]:
            return run(arguments.out, optimizer, index, seed, batch_tokens, arguments.override)

        start = default_index(optimizer)
        best, losses = tune(start, lambda index, once=once: score(once(index)))
        runs = [once(best, seed) for seed in range(arguments.seeds)]
        results[optimizer] = {
            "lr": GRID_ORIGIN * 2.0**best,
            "grid": {f"{GRID_ORIGIN * 2.0**i:.3g}": losses[i] for i in sorted(losses)},
            "default_above_best": losses[start] / losses[best] - 1,
            "losses": [r["loss"] for r in runs],
            "curves": [r["curve"] for r in runs],
            "seconds": statistics.median(r["summary"]["training_seconds"] for r in runs),
            "optimizer_state_bytes": runs[0]["summary"]["optimizer_state_bytes"],
        }
        print(batch_tokens, optimizer, results[optimizer]["lr"], results[optimizer]["losses"], flush=True)
    return results


def table(results: dict[str, Any]) -> str:
    """Return one batch size's comparison as Markdown."""
    reference = statistics.mean(results["adamw"]["losses"]) if "adamw" in results else None
    lines = [
        "| optimizer | best lr | val loss, mean (lowest to highest) | tokens to AdamW's final loss | seconds "
        "| state bytes | default's loss above best |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        losses = result["losses"]
        reached = [tokens_to_reach(curve, reference) for curve in result["curves"]] if reference else []
        tokens = [t for t in reached if t is not None]
        share = f"{statistics.mean(tokens):,.0f}" if tokens and len(tokens) == len(reached) else "not reached"
        lines.append(
            f"| {name} | {result['lr']:.3g} | {statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}) "
            f"| {share} | {result['seconds']:.0f} | {result['optimizer_state_bytes']:,} "
            f"| {result['default_above_best']:.2%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train the missing runs, print the tables, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of results.json")
    parser.add_argument("--optimizers", default="adamw,lion,tiger,muon")
    parser.add_argument("--batch-tokens", default="4096")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("override", nargs="*", help="further overrides for every run")
    arguments = parser.parse_args()
    results = {}
    for batch_tokens in map(int, arguments.batch_tokens.split(",")):
        results[batch_tokens] = compare(arguments, batch_tokens)
        (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nbatch_tokens={batch_tokens}\n\n{table(results[batch_tokens])}", flush=True)


if __name__ == "__main__":
    main()
