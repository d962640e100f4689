"""Does skipping rows without a gradient lower the loss of sign and orthogonal rules?

    python benchmarks/idle_rows_experiment.py --out runs/idle_rows --seeds 3

Trains Python source with `optimizer.skip_idle_rows` true and false. Rows are embeddings of an untied model with a
vocabulary of 4096 tokens, of which an update of 512 tokens uses a few hundred, or experts of a mixture of 16 without
balancing. Each side walks the same grid of rates, factors of two from the optimizer's default, with seed 0, until the
lowest validation loss has a higher one on both sides. The best rate then runs with all seeds. Finished runs are kept.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from grid import composed, index_of, loss_of, lowest, rate_of, run, walk

COMMON = [
    "model.d_model=64", "model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=2", "context_length=64",
    "batch_tokens=512", "micro_batch_size=8", "max_steps=300", "val_every=300", "checkpoint_every=300", "scaling=none",
    "callbacks.samples=null", "callbacks.curves=null", "trainer=cpu", "trainer.precision=32-true",
    "loader.val_tokens=32768",
]  # fmt: skip
EMBEDDINGS = ["tokenizer=bpe", "model.tie_embeddings=false", "model.ffn.d_ff=128"]
EXPERTS = [
    "tokenizer=bytes", "model=moe", "model/ffn/balance=none", "model.ffn.num_experts=16", "model.ffn.top_k=1",
    "model.ffn.router.normalize=false", "model.ffn.d_ff=64", "batch_tokens=256", "micro_batch_size=4",
]  # fmt: skip
CASES = {
    "lion, embeddings": ["optimizer=lion", *EMBEDDINGS],
    "tiger, embeddings": ["optimizer=tiger", *EMBEDDINGS],
    "lion, experts": ["optimizer=lion", *EXPERTS],
    "tiger, experts": ["optimizer=tiger", *EXPERTS],
    "muon, experts": ["optimizer=muon", *EXPERTS],
}


def measure(out: Path, overrides: list[str], seeds: int) -> dict[str, Any]:
    """Return the best rate of one side, its losses by seed, and the losses of the grid."""

    def once(index: int, seed: int) -> float:
        rate = [f"optimizer.lr={rate_of(index):.6g}", f"seed={seed}"]
        return loss_of(run(out / f"rate{index:+d}-seed{seed}", [*COMMON, *overrides, *rate]))

    start = round(index_of(composed([*COMMON, *overrides])["optimizer"]["lr"]))
    losses = walk(start, lambda index: once(index, 0))
    best = lowest(losses)
    grid = {f"{rate_of(index):.3g}": loss for index, loss in losses.items()}
    return {"lr": rate_of(best), "losses": [once(best, seed) for seed in range(seeds)], "grid": grid}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| rule, rows | lr with, without | val/loss with | val/loss without | with minus without, per seed |",
        "|---|---|---|---|---|",
    ]
    for name, sides in results.items():
        with_it, without = sides["true"]["losses"], sides["false"]["losses"]
        differences = ", ".join(f"{a - b:+.3f}" for a, b in zip(with_it, without, strict=True))
        lines.append(
            f"| {name} | {sides['true']['lr']:.3g}, {sides['false']['lr']:.3g} | {statistics.mean(with_it):.3f} "
            f"| {statistics.mean(without):.3f} | {differences} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", metavar="NAME", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name in arguments.cases:
        sides = {
            skips: measure(
                arguments.out / name.replace(",", "").replace(" ", "_") / skips,
                [*CASES[name], f"optimizer.skip_idle_rows={skips}"],
                arguments.seeds,
            )
            for skips in ("true", "false")
        }
        results[name] = sides
        (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(table(results), flush=True)


if __name__ == "__main__":
    main()
