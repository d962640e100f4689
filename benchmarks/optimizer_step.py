"""How long does one optimizer step take at 124m, compared with torch's and the published optimizers?

    python benchmarks/optimizer_step.py --rounds 9
    python benchmarks/optimizer_step.py --device cuda --rounds 30

Every side updates the parameters of `model=dense model/size=124m` (124 M; the Muons the 85 M in hidden matrices) from
the same gradients, with a state of its own and the settings in conf/optimizer. Each round runs every side once, in an
order that rotates; speeds are medians over rounds of (time of the reference / time of the side) within a round, with
quartiles. Peers that are not installed are named and skipped: `pip install lion-pytorch pytorch_optimizer`, and from
their repositories `muon` (KellerJordan/Muon) and `dion` (microsoft/dion). What Muon adds to a training step is given as
a share of forward and backward, timed here on a few windows and scaled by tokens. On a machine that others use too,
`OMP_NUM_THREADS=1 ... --clock cpu` counts this process's own seconds on one thread.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from llm.config.build import build_model
from llm.config.files import to_plain
from llm.config.pieces import instantiate
from llm.contracts import ParamGroup
from llm.model.transformer import Transformer
from llm.ops.loss import linear_cross_entropy
from llm.optim.param_groups import build_param_groups

VOCAB, CONTEXT = 50_304, 512
RATES = {"lr": 1e-4, "weight_decay": 0.1}
BATCHES = (16_384, 524_288)
"""Tokens per update, for which Muon's share of a training step is given."""

Sides = dict[str, Callable[[], torch.optim.Optimizer]]


def load(size: str, layers: int, device: str) -> tuple[Transformer, dict[str, Any]]:
    """Return the model with gradients, and the plain configuration of each optimizer."""
    depth = [f"model.num_layers={layers}"] if layers else []
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "conf"), version_base="1.3"):
        cfgs = {
            name: to_plain(compose("train", [f"model/size={size}", f"optimizer={name}", "name=bench", *depth]))
            for name in ("lion", "tiger", "muon")
        }
    model = build_model(cfgs["lion"], VOCAB).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model, {name: cfg["optimizer"] for name, cfg in cfgs.items()}


def torch_adamw(groups: list[ParamGroup], **options: Any) -> torch.optim.Optimizer:
    """Return torch's AdamW on copies of the groups, in which it leaves its options."""
    return torch.optim.AdamW([dict(group) for group in groups], **RATES, **options)


def elementwise_sides(groups: list[ParamGroup], nodes: dict[str, Any]) -> Sides:
    """Builders of the optimizers that update all parameters."""
    params = [parameter for group in groups for parameter in group["params"]]
    return {
        "torch AdamW, fused": lambda: torch_adamw(groups, fused=True),
        "torch AdamW, foreach": lambda: torch_adamw(groups, foreach=True),
        "Lion": lambda: instantiate(nodes["lion"])(groups),
        "Tiger": lambda: instantiate(nodes["tiger"])(groups),
        "lion_pytorch Lion": lambda: importlib.import_module("lion_pytorch").Lion(params, **RATES),
        "pytorch_optimizer Lion": lambda: importlib.import_module("pytorch_optimizer").Lion(params, **RATES),
        "pytorch_optimizer Tiger": lambda: importlib.import_module("pytorch_optimizer").Tiger(params, **RATES),
    }


def muon_sides(groups: list[ParamGroup], nodes: dict[str, Any]) -> Sides:
    """Builders of the Muons, over the hidden matrices alone."""
    matrices = [group for group in groups if group["kind"] == "matrix"]
    params = matrices[0]["params"]

    def dion(**options: Any) -> torch.optim.Optimizer:
        return importlib.import_module("dion").Muon(params, **RATES, nesterov=True, **options)

    return {
        "torch Muon": lambda: torch.optim.Muon(params, **RATES, adjust_lr_fn="match_rms_adamw"),
        "Keller Jordan's Muon": lambda: importlib.import_module("muon").SingleDeviceMuon(params, **RATES),
        "dion Muon, quintic": lambda: dion(use_polar_express=False),
        "dion Muon, Polar Express": lambda: dion(),
        "Muon": lambda: instantiate(nodes["muon"])(matrices),
        "Muon, Polar Express": lambda: instantiate(nodes["muon"], iteration="polar_express")(matrices),
    }


def wait(device: str) -> None:
    """Synchronize with the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(sides: Sides, *, rounds: int, device: str, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Time every side once per round, in an order that rotates, after two steps to warm up."""
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name, build in sides.items():
        try:
            optimizer = build()
        except ImportError as error:
            print(f"{name}: skipped, {error}")
            continue
        for _ in range(2):
            optimizer.step()
        optimizers[name] = optimizer
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    names = list(optimizers)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            wait(device)
            started = clock()
            optimizers[name].step()
            wait(device)
            seconds[name].append(clock() - started)
    return seconds


def print_table(title: str, seconds: dict[str, list[float]], reference: str) -> None:
    """Print medians, quartiles and speed relative to `reference`."""
    print(f"\n{title}\n{'':26}{'median ms':>10}{'quartiles':>18}   speed, x {reference} (quartiles)")
    for name, values in seconds.items():
        low, middle, high = (1e3 * q for q in statistics.quantiles(values, n=4))
        ratios = [a / b for a, b in zip(seconds[reference], values, strict=True)]
        down, ratio, up = statistics.quantiles(ratios, n=4)
        print(f"{name:26}{middle:10.1f}{low:9.1f}{high:9.1f}   {ratio:.2f} ({down:.2f} to {up:.2f})")


def seconds_a_token(model: Transformer, *, windows: int, rounds: int, device: str, clock: Callable[[], float]) -> float:
    """Time forward and backward in bfloat16 autocast on a few windows; the median of `rounds`."""
    ids = torch.randint(VOCAB, (windows, CONTEXT + 1), device=device)
    positions = torch.arange(CONTEXT, device=device).expand(windows, CONTEXT)

    def run() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            hidden = model(ids[:, :-1], positions=positions).hidden
            loss = linear_cross_entropy(hidden, model.lm_head.weight, ids[:, 1:].contiguous())
        loss.backward()
        return loss

    seconds = []
    for _ in range(rounds + 1):
        wait(device)
        started = clock()
        run()
        wait(device)
        seconds.append(clock() - started)
    return statistics.median(seconds[1:]) / (windows * CONTEXT)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="124m")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers of the same shapes, for a quick look")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--windows", type=int, default=2, help="windows in the timed forward and backward")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--part", choices=("elementwise", "muon", "share"), nargs="*", help="default: all")
    arguments = parser.parse_args()
    parts = arguments.part or ["elementwise", "muon", "share"]
    model, nodes = load(arguments.size, arguments.layers, arguments.device)
    groups = build_param_groups(model, **RATES)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e6:.1f} M parameters, {torch.get_num_threads()} threads, torch {torch.__version__}")
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    timing = {"rounds": arguments.rounds, "device": arguments.device, "clock": clock}
    if "elementwise" in parts:
        seconds = measure(elementwise_sides(groups, nodes), **timing)
        print_table("All parameters", seconds, "torch AdamW, fused")
    if "muon" in parts:
        seconds = measure(muon_sides(groups, nodes), **timing)
        fastest = min((n for n in seconds if not n.startswith("Muon")), key=lambda n: statistics.median(seconds[n]))
        print_table("Hidden matrices", seconds, fastest)
    if "share" in parts:
        token = seconds_a_token(model, windows=arguments.windows, **timing)
        sides: Sides = {
            "adamw": lambda: torch_adamw(groups, fused=True),
            "muon": lambda: instantiate(nodes["muon"])(groups),
        }
        steps = {n: statistics.median(v) for n, v in measure(sides, **timing).items()}
        print(f"\nforward and backward: {1e6 * token:.1f} µs per token")
        for tokens in BATCHES:
            shares = {name: step / (token * tokens) for name, step in steps.items()}
            added = (steps["muon"] - steps["adamw"]) / (token * tokens + steps["adamw"])
            print(
                f"batch_tokens={tokens}: AdamW takes {shares['adamw']:.2%} of forward and backward, Muon "
                f"{shares['muon']:.2%}; a training step with Muon is {added:.2%} longer"
            )


if __name__ == "__main__":
    main()
