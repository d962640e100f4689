"""How far back does each attention find a value by its key?

    python train.py experiment=recall hydra.run.dir=runs/recall-softmax
    python train.py experiment=recall model/attention=linear hydra.run.dir=runs/recall-linear
    python benchmarks/recall_experiment.py runs/recall-* --out docs/recall

Each run is evaluated on new documents of its task at several distances between a pair and its question: the share of
values that the model ranks first.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data.synthetic import AssociativeRecall
from llm.training.rebuild import rebuild

DOCUMENTS = 400
SMOOTH = 20
UNSEEN = 10_000_000
"""Seed of the documents for evaluation; training draws its own from the run's data.seed."""


@torch.no_grad()
def accuracy(model: torch.nn.Module, tokenizer: Any, settings: dict, distance: int) -> float:
    """Return the share of values that the model ranks first, at one distance."""
    task = AssociativeRecall(**settings | {"distance": distance, "seed": UNSEEN, "num_documents": DOCUMENTS})
    right = total = 0
    for number in range(DOCUMENTS):
        text = task.document(number)
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode_batch([text.data.decode()])[0].tolist()]])
        places = torch.arange(ids.shape[1] - 1)[None]
        scores = model.logits(model(ids[:, :-1], positions=places).hidden)
        is_scored = torch.from_numpy(np.asarray(text.is_scored))
        right += int((scores.argmax(-1) == ids[:, 1:])[0][is_scored].sum())
        total += int(is_scored.sum())
    return right / total


def loss_curve(folder: Path) -> tuple[list[int], list[float]]:
    """Return updates and training loss, each the mean over the SMOOTH updates before it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    means = np.convolve(losses, np.full(SMOOTH, 1 / SMOOTH), mode="valid")
    return list(range(SMOOTH, len(losses) + 1)), means.tolist()


def picture(folders: list[Path], results: dict[str, dict[int, float]], path: Path) -> None:
    """Draw the loss while learning and the accuracy over distance, one line per run."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    learning, judged = figure.subplots(1, 2)
    for folder in folders:
        learning.plot(*loss_curve(folder), label=folder.name)
        judged.plot(list(results[folder.name]), list(results[folder.name].values()), "o-", markersize=3)
    learning.set(xlabel="updates", ylabel="training loss, nats an answer", title="Learning", yscale="log")
    judged.set(xlabel="letters between the pairs and the questions", ylabel="accuracy", title="Recall over distance")
    judged.set_ylim(0, 1.02)
    learning.legend(fontsize=8)
    for axes in (learning, judged):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Evaluate every run, then print and save the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--distances", type=int, nargs="+", default=[0, 16, 32, 48, 64, 80, 96])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results = {}
    for folder in arguments.runs:
        run = rebuild(folder, "last")
        settings = {k: v for k, v in run.config.tree["data"].items() if not k.startswith("_")}
        model = run.module.model.float().cpu().eval()
        scores = {d: accuracy(model, run.data.tokenizer, settings, d) for d in arguments.distances}
        results[folder.name] = scores
        print(folder.name, scores, flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = ["| run |" + "".join(f" {d} |" for d in arguments.distances), "|---|" + "---|" * len(arguments.distances)]
    lines += [f"| {name} |" + "".join(f" {x:.2f} |" for x in by.values()) for name, by in results.items()]
    (arguments.out / "table.md").write_text("\n".join(lines) + "\n")
    picture(arguments.runs, results, arguments.out / "plot.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
