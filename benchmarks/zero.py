"""How much memory and communication does each ZeRO stage need per rank, compared with the estimate of `plan=true`?

    python benchmarks/zero.py --ranks 2 -- model/size=tiny optimizer=muon
    python benchmarks/zero.py --ranks 8 --stages 1,2,3 -- trainer.accelerator=gpu trainer.precision=bf16-true \\
        model/size=350m optimizer=muon

Memory: the bytes of the tensors themselves, on the rank that holds most. These are weights, gradients at their peak
(after a backward pass or during clipping), optimizer state and fp32 masters. Communication: the bytes that one rank
passes to collectives per update, counted as ring algorithms send them. arXiv:1910.02054, section 7, predicts them; the
exchange of an optimizer is listed separately. The share of an update that Muon spends in its exchange is measured on
rank 0 and includes waiting.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback

from llm.config.check import check
from llm.config.files import to_plain
from llm.config.sizes import accelerator, batch_plan
from llm.distributed.launch import start_processes
from llm.distributed.zero.rank_memory import bytes_per_rank, bytes_sent_per_update
from llm.distributed.zero.sharded_gradients import ShardedGradients
from llm.ops.precision import resolve_precision
from llm.optim.exchange import OwnerExchange
from llm.optim.receipt import lines
from llm.training.train import train

CONF = Path(__file__).resolve().parents[1] / "conf"
SHORT = (
    "trainer=deepspeed", "name=zero", "max_steps=8", "val_every=8", "checkpoint_every=8", "callbacks.samples=null",
    "callbacks.curves=null", "callbacks.progress=null", "callbacks.rank_checksum=null", "tokenizer=bytes",
    "data=synthetic", "loader.val_tokens=512", "context_length=64", "micro_batch_size=2", "batch_tokens=512",
    "trainer.accelerator=cpu", "trainer.precision=32-true",
)  # fmt: skip
RING = {"all_reduce": 2.0, "reduce_scatter_tensor": 1.0, "all_gather_into_tensor": 1.0, "reduce": 1.0, "broadcast": 1.0}
"""How often a ring sends its data, times (R−1)/R; of gathering, the gathered whole."""


class Meter(Callback):
    """Counts bytes given to collectives, seconds in the exchange, and bytes held when gradients are complete."""

    def __init__(self) -> None:
        self.sent, self.exchanged, self.in_exchange = 0.0, 0.0, 0.0
        self.held: dict[str, float] = {}
        self.updates: list[tuple[float, float]] = []
        self._since = time.perf_counter()

    def watch(self) -> None:
        """Put counters around what moves data."""
        for name, times in RING.items():
            setattr(dist, name, self._counted(getattr(dist, name), name, times))
        exchange, norm = OwnerExchange.map, ShardedGradients.norm

        def timed(own: OwnerExchange, *arguments: Any, **options: Any) -> Any:
            began, before = time.perf_counter(), own.elements_sent
            out = exchange(own, *arguments, **options)
            self.in_exchange += time.perf_counter() - began
            self.exchanged += (own.elements_sent - before) * out.element_size()
            return out

        def weighed(own: ShardedGradients) -> Any:
            parts = [part for index in range(len(own.layouts)) for part in own._parts(index)]
            self._holds_gradients(parts)
            return norm(own)

        OwnerExchange.map, ShardedGradients.norm = timed, weighed

    def _counted(self, function: Any, name: str, times: float) -> Any:
        def counted(*tensors: Any, **options: Any) -> Any:
            ranks = dist.get_world_size(options.get("group"))
            given = [t for t in (*tensors, *options.values()) if isinstance(t, torch.Tensor)]
            whole = max((t.numel() * t.element_size() for t in given), default=0)
            self.sent += times * whole * (ranks - 1) / ranks
            return function(*tensors, **options)

        return counted

    def _holds_gradients(self, tensors: list[torch.Tensor]) -> None:
        total = float(sum(t.numel() * t.element_size() for t in tensors))
        self.held["gradients"] = max(self.held.get("gradients", 0.0), total)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Measure the memory that a backward pass leaves in use."""
        self._holds_gradients([p.grad for p in pl_module.parameters() if p.grad is not None])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Record the totals of an update."""
        if trainer.global_step == len(self.updates):
            return  # not the last micro-batch of its update
        now = time.perf_counter()
        self.updates.append((now - self._since, self.in_exchange))
        self._since, self.in_exchange = now, 0.0
        inner = trainer.optimizers[0]
        flats = [layout.flat for layout in trainer.strategy.layouts]
        parameters = list(pl_module.parameters())
        weights = sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in parameters)
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        state = sum(
            t.numel() * t.element_size() for held in inner.state.values() for t in held.values() if torch.is_tensor(t)
        )
        addresses = {getattr(p, "ds_tensor", p).data_ptr() for p in parameters}
        masters = sum(f.numel() * f.element_size() for f in flats if f.data_ptr() not in addresses)
        self.held |= {"weights": float(weights), "state": float(state + masters)}
        self.held["state_whole"] = float(sum(line.state_bytes for line in lines(trainer.optimizers[0])))
        self.held["parameters"] = float(sum(getattr(p, "ds_numel", p.numel()) for p in parameters))


def measure(cfg: dict[str, Any], out: Path) -> None:
    """Train as one of the ranks and write what was metered."""
    import llm.training.module_and_trainer

    meter = Meter()
    meter.watch()
    build = llm.training.module_and_trainer.build_trainer
    llm.training.module_and_trainer.build_trainer = lambda cfg, **arguments: build(
        cfg, **{**arguments, "callbacks": [*arguments["callbacks"], meter]}
    )
    check(cfg)
    folder = out / "run"
    folder.mkdir(exist_ok=True)
    train(cfg, folder)
    updates = meter.updates[2:]
    (out / f"rank{dist.get_rank()}.json").write_text(
        json.dumps(
            {
                "held": meter.held,
                "sent": meter.sent / len(meter.updates),
                "exchanged": meter.exchanged / len(meter.updates),
                "seconds": statistics.median(seconds for seconds, _ in updates),
                "share": statistics.median(inside / seconds for seconds, inside in updates),
            }
        )
    )


def row(stage: int, cfg: dict[str, Any], ranks: int) -> str:
    """Run one stage on all ranks and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(cfg))
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(path)]
        if start_processes(command, processes=ranks):
            raise SystemExit(1)
        found = [json.loads(p.read_text()) for p in Path(folder).glob("rank*.json")]
    held = {key: max(one["held"][key] for one in found) for key in found[0]["held"]}
    plan, precision = cfg["batch_tokens"] // cfg["context_length"], cfg["trainer"]["precision"]
    accumulation = plan // (ranks * cfg["micro_batch_size"])
    parameters, whole = int(held["parameters"]), int(held["state_whole"])
    told = bytes_per_rank(parameters=parameters, state_bytes=whole, stage=stage, ranks=ranks, precision=precision)
    sending = bytes_sent_per_update(
        parameters=parameters, stage=stage, ranks=ranks, accumulation=accumulation, precision=precision
    )
    sent = max(one["sent"] for one in found)
    cells = [f"{held[key] / 1e6:.2f} ({held[key] / expected - 1:+.1%})" for key, expected in told._asdict().items()]
    cells += [f"{sent / 1e6:.2f} ({sent / sending - 1:+.1%})", f"{max(one['exchanged'] for one in found) / 1e6:.2f}"]
    cells += [f"{statistics.median(one['seconds'] for one in found) * 1e3:.0f}"]
    cells += [f"{statistics.median(one['share'] for one in found):.1%}"]
    return f"| {stage} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print one row per stage, in MB, with the difference from the estimate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("override", nargs="*")
    arguments = parser.parse_args()
    if arguments.worker is not None:
        measure(json.loads(arguments.worker.read_text()), arguments.worker.parent)
        return
    print(
        "| stage | weights MB | gradients MB | state, masters MB | sent MB | by Muon MB | ms an update | in exchange |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for stage in map(int, arguments.stages.split(",")):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = to_plain(compose("train", [*SHORT, f"trainer.stage={stage}", *arguments.override]))
        kind = accelerator(cfg["trainer"])
        cfg["trainer"]["precision"] = resolve_precision(cfg["trainer"]["precision"], accelerator=kind)
        assert batch_plan(cfg)
        print(row(stage, cfg, arguments.ranks), flush=True)


if __name__ == "__main__":
    main()
