"""Which estimator and size of codebook serve keys best?

    python train.py -m experiment=codebook model.attention.codebook.codebook_size=32,128,512 \\
        model.attention.codebook.estimator=ema,straight_through,rotation,simvq
    python benchmarks/codebook_experiment.py multirun/*/* --out docs/codebook

Reads run folders: the share of codes in use, their perplexity and the relative error of quantisation, each the mean
over layers and over the last fifty updates, and the final validation loss.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

LAST = 50
MEASURES = {"usage": "codebook_usage", "perplexity": "codebook_perplexity", "error": "quantization_error"}


def read(folder: Path) -> dict[str, Any]:
    """Return the settings and measures of one run."""
    codebook = yaml.safe_load((folder / "config.yaml").read_text())["model"]["attention"]["codebook"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "train/loss" in line][-LAST:]
    row: dict[str, Any] = {
        "size": codebook["codebook_size"],
        "estimator": codebook["estimator"],
        "revived": codebook["revive_every"] is not None,
        "val/loss": [line["val/loss"] for line in lines if "val/loss" in line][-1],
    }
    for short, name in MEASURES.items():
        row[short] = statistics.mean(v for line in training for k, v in line.items() if k.endswith(name))
    return row


def main() -> None:
    """Read every run, then print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    runs = [folder for folder in arguments.runs if (folder / "config.yaml").is_file()]
    rows = sorted((read(folder) for folder in runs), key=lambda r: (r["size"], not r["revived"], r["estimator"]))
    lines = [
        "| codes | estimator | dead codes | in use | perplexity | error | val/loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        dead = "revived" if row["revived"] else "left"
        lines.append(
            f"| {row['size']} | {row['estimator']} | {dead} | {row['usage']:.2f} | {row['perplexity']:.0f} | "
            f"{row['error']:.3f} | {row['val/loss']:.4f} |"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    (arguments.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
