"""Does every optimizer give the same training on ZeRO's shards as on one device?

    python benchmarks/zero_equality.py --out runs/zero_equality
    python benchmarks/zero_equality.py --out runs/zero_equality --optimizers muon --stages 2,3 --ranks 4

Each case is 20 updates of a tiny model on 2 CPU ranks, beside one process that takes the same micro-batches one after
the other. Printed is the largest difference of a training loss, in nats, and of a weight after the last update. The
reference of bf16-true (bf16 weights with fp32 masters) is one process in bf16-mixed: their difference is bf16's
rounding, not that of the ranks. In fp32 Muon's products are fp32 too: bf16 rounds gradients that differ in the last
bit to different neighbours now and then, and orthogonalisation makes that visible. Finished cases are kept in OUT and
not repeated.
"""

import argparse
import contextlib
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from llm.config.check import check
from llm.config.files import to_plain
from llm.distributed.launch import start_processes
from llm.training.train import train

CONF = Path(__file__).resolve().parents[1] / "conf"
STEPS = 20
MICRO, CONTEXT = 2, 32
MODELS = {
    "dense": ("model=dense",),
    "moe": ("model=moe", "model.ffn.num_experts=4"),
    "vq": (
        "model=dense",
        "model/attention=vq",
        "model/position=none",
        "model.attention.block_size=16",
        "model.attention.codebook.codebook_size=8",  # more codes than keys per micro-batch would tie
    ),
    "delta": (
        "model=hybrid",
        "model/position=none",
        "model.attention.pattern=[delta,softmax]",
        "model.residual=attention",
        "model.residual_block=1",
    ),
    "latent": (
        "model=moe",
        "model.ffn.num_experts=4",
        "model.ffn.match=none",
        "model.ffn.latent=16",
        "model.ffn.activation=situ",
        "model.position.turn_values=true",
        "model.attention.shared_kv=true",
    ),
}
TINY = (
    "model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "model.ffn.d_ff=48",
    "tokenizer=bytes", "data=synthetic", "data.num_documents=200", f"context_length={CONTEXT}",
    f"micro_batch_size={MICRO}", f"max_steps={STEPS}", f"val_every={STEPS}", f"checkpoint_every={STEPS}",
    "loader.val_tokens=512", "loader.val_fraction=0.2", "callbacks.samples=null", "callbacks.curves=null",
    "callbacks.progress=null", "name=equality", "seed=1", "scaling=none",
)  # fmt: skip


def case_name(case: dict[str, Any]) -> str:
    """Return the name of a case's folder."""
    return "-".join(str(case[key]) for key in ("model", "optimizer", "precision", "accumulation", "clip", "stage"))


def overrides(case: dict[str, Any], ranks: int) -> list[str]:
    """Return the settings of one case; stage None is one process."""
    windows = case["accumulation"] * ranks * MICRO
    settings = [*MODELS[case["model"]], *TINY, f"optimizer={case['optimizer']}", f"batch_tokens={windows * CONTEXT}"]
    settings += [f"trainer.precision={case['precision']}", f"trainer.gradient_clip_val={case['clip']}"]
    if case["optimizer"] == "muon" and case["precision"] == "32-true":
        settings.append("optimizer.matmul_dtype=float32")
    if case["stage"] is None:
        return [*settings, "trainer=cpu"]
    own = ["trainer=deepspeed", "trainer.accelerator=cpu", f"trainer.stage={case['stage']}"]
    return [*settings, *own, "trainer.persistence_threshold=64"]


def is_finished(folder: Path) -> bool:
    """Return whether a case has been run."""
    path = folder / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def run_cases(cases: list[dict[str, Any]], out: Path, ranks: int) -> None:
    """Train the cases one after the other, in this process as one of the ranks, or alone."""
    for case in cases:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = to_plain(compose("train", overrides(case, ranks)))
        check(cfg)
        folder = out / case_name(case)
        folder.mkdir(parents=True, exist_ok=True)
        train(cfg, folder)


def run_missing(cases: list[dict[str, Any]], out: Path, ranks: int) -> None:
    """Train the missing cases: references in this process, the others in processes of their own."""
    missing = [case for case in cases if not is_finished(out / case_name(case))]
    run_cases([case for case in missing if case["stage"] is None], out, ranks)
    sharded = [case for case in missing if case["stage"] is not None]
    if sharded:
        todo = out / "todo.json"
        todo.write_text(json.dumps(sharded))
        command = [sys.executable, str(Path(__file__).resolve()), "--out", str(out), "--worker", str(todo)]
        if start_processes([*command, "--ranks", str(ranks)], processes=ranks):
            raise SystemExit(1)


def reference_of(case: dict[str, Any]) -> dict[str, Any]:
    """Return the case in one process that a case is compared with."""
    precision = "bf16-mixed" if case["precision"] == "bf16-true" else case["precision"]
    return {**case, "precision": precision, "stage": None}


def differences(case: dict[str, Any], out: Path) -> tuple[float, float]:
    """Return the largest difference of a loss and of a weight from the reference."""
    losses, weights = [], []
    for one in (case, reference_of(case)):
        folder = out / case_name(one)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["train/loss"] for row in rows])
        state = load_file(folder / "checkpoints/last/model.safetensors")
        weights.append({name: tensor.float() for name, tensor in state.items()})
    assert len(losses[0]) == len(losses[1]) == STEPS
    loss = max(abs(a - b) for a, b in zip(*losses, strict=True))
    return loss, max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])


def table(cases: list[dict[str, Any]], out: Path) -> str:
    """Return the differences as Markdown, a row for each model, optimizer, precision, accumulation and clipping."""
    stages = sorted({case["stage"] for case in cases})
    lines = [
        "| model | optimizer | precision | accumulation | clip | " + " | ".join(f"stage {s}" for s in stages) + " |",
        "|---|---|---|---|---|" + "---|" * len(stages),
    ]
    rows: dict[tuple[Any, ...], dict[int, str]] = {}
    for case in cases:
        key = tuple(case[k] for k in ("model", "optimizer", "precision", "accumulation", "clip"))
        loss, weight = differences(case, out)
        rows.setdefault(key, {})[case["stage"]] = f"{loss:.1e} / {weight:.1e}"
    for key, cells in rows.items():
        shown = ["off" if part == "null" else str(part) for part in key]
        lines.append("| " + " | ".join([*shown, *(cells.get(s, "refused") for s in stages)]) + " |")
    return "\n".join(lines) + "\n"


def all_cases(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return every valid combination that was requested."""
    keys = ("model", "optimizer", "precision", "accumulation", "clip", "stage")
    asked = [getattr(arguments, f"{key}s").split(",") for key in keys]
    cases = [dict(zip(keys, values, strict=True)) for values in product(*asked)]
    for case in cases:
        case["stage"], case["accumulation"] = int(case["stage"]), int(case["accumulation"])
    return [case for case in cases if not (case["precision"] == "bf16-true" and case["stage"] < 2)]


def main() -> None:
    """Train the missing cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of table.md")
    parser.add_argument("--models", default="dense,moe,vq")
    parser.add_argument("--optimizers", default="adamw,lion,tiger,muon")
    parser.add_argument("--precisions", default="32-true,bf16-mixed,bf16-true")
    parser.add_argument("--accumulations", default="1,4")
    parser.add_argument("--clips", default="0.5,null")
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.worker is not None:
        run_cases(json.loads(arguments.worker.read_text()), arguments.out, arguments.ranks)
        return
    cases = all_cases(arguments)
    references = list({case_name(one): one for one in map(reference_of, cases)}.values())
    run_missing([*references, *cases], arguments.out, arguments.ranks)
    text = table(cases, arguments.out)
    (arguments.out / "table.md").write_text(text)
    with contextlib.suppress(BrokenPipeError):
        print(text)


if __name__ == "__main__":
    main()
