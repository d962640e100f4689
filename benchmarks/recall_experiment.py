"""How far back does each attention find a value by its key?

    python train.py experiment=recall hydra.run.dir=runs/recall-softmax
    python train.py experiment=recall model/attention=linear hydra.run.dir=runs/recall-linear
    python benchmarks/recall_experiment.py runs/recall-* --out docs/recall

Each run is judged on fresh documents of its task at several distances between a pair and its question: the share of
values that the model ranks first.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.synthetic import AssociativeRecall
from llm.rebuild import rebuild

DOCUMENTS = 400
UNSEEN = 10_000_000
"""Seed of the documents that judge: training draws its own from the run's data.seed."""


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


def main() -> None:
    """Judge every run, print and keep the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--distances", type=int, nargs="+", default=[0, 16, 32, 48, 64, 80, 96])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results = {}
    for folder in arguments.runs:
        run = rebuild(folder, "last")
        settings = {k: v for k, v in run.config["data"].items() if not k.startswith("_")}
        model = run.module.model.float().cpu().eval()
        scores = {d: accuracy(model, run.data.tokenizer, settings, d) for d in arguments.distances}
        results[folder.name] = scores
        print(folder.name, scores, flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = ["| run |" + "".join(f" {d} |" for d in arguments.distances), "|---|" + "---|" * len(arguments.distances)]
    lines += [f"| {name} |" + "".join(f" {x:.2f} |" for x in by.values()) for name, by in results.items()]
    (arguments.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
