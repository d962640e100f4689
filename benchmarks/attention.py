"""How do time and memory of each attention grow with the context, compared with SDPA and public linear kernels?

    OMP_NUM_THREADS=1 python benchmarks/attention.py --lengths 1024 2048 4096 8192 16384 --rounds 5
    python benchmarks/attention.py --device cuda --lengths 1024 4096 16384 65536

One round runs forward and backward of every side at every length once, in an order that rotates. Every side gets the
same queries, keys and values, 4 heads of 64, one row. Ours include position encoding and quantisation. Times are
medians over rounds, with quartiles in the JSON. Memory is the growth of the peak over the memory in use before the
call. An exponent is the slope of log time over log length from 4096 tokens on, or over all lengths if fewer than three
of them are that long.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from llm.contracts import AttentionGeometry
from llm.ops.allocator import keep_freed_memory

CONF = Path(__file__).resolve().parent.parent / "conf"
HEADS, HEAD_DIM = 4, 64
QUADRATIC = ("softmax rope", "softmax rerope", "SDPA")
HUNGRY = ("performer-pytorch",)
"""Sides that store all prefix sums, 750 KiB per token."""
SIDES = {
    "softmax rope": ["model/attention=softmax", "model/position=rope"],
    "softmax rerope": ["model/attention=softmax", "model/position=rerope", "model.position.window=256"],
    "local 256": ["model/attention=softmax", "model/position=rope", "model.attention.window=256"],
    "linear": ["model/attention=linear", "model/position=rope"],
    "linear decay norm": [
        "model/attention=linear", "model/position=rope", "model.attention.feature_map=identity",
        "model.attention.decay=fixed", "model.attention.output_norm=true",
    ],
    "performer": ["model/attention=performer", "model/position=rope"],
    "vq": [
        "model/attention=vq", "model/position=rerope", "model.position.window=256", "model.attention.block_size=256",
        "model.attention.codebook.codebook_size=512",
    ],
}  # fmt: skip

Side = Callable[[Tensor, Tensor, Tensor], Tensor]


def our_side(overrides: list[str], device: torch.device) -> Side:
    """Return the mixing of one attention of the project, built from its configuration."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        model = compose("train", overrides=["name=benchmark", *overrides]).model
    position = instantiate(model.position, _convert_="all")(head_dim=HEAD_DIM)
    geometry = AttentionGeometry(d_model=HEADS * HEAD_DIM, num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM)
    layer = instantiate(model.attention, _convert_="all")(geometry=geometry, position=position, layer_index=0)
    layer.to(device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = torch.arange(q.shape[1], device=device)[None]
        return layer.attend(q, k, v, positions=positions, document_ids=None, cache=None)[0]

    return run


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def peers(device: torch.device) -> dict[str, Side]:
    """Return the public kernels that are installed; on a CPU, only the forms that run there."""
    found: dict[str, Side] = {"SDPA": sdpa}
    try:
        from performer_pytorch import FastAttention

        fast = FastAttention(dim_heads=HEAD_DIM, nb_features=256, causal=True).to(device)
        found["performer-pytorch"] = lambda q, k, v: fast(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    except ImportError:
        print("performer-pytorch: not installed")
    try:
        from fla.ops.linear_attn import chunk_linear_attn

        found["fla"] = lambda q, k, v: chunk_linear_attn(F.elu(q) + 1, F.elu(k) + 1, v, normalize=True)[0]
    except ImportError:
        try:
            import importlib.util
            import sys
            from importlib.machinery import PathFinder

            # its package imports Triton, which needs a GPU; the plain form is in a file of its own
            spec = PathFinder.find_spec("fla", sys.path)
            path = Path(next(iter(spec.submodule_search_locations))) / "ops" / "linear_attn" / "naive.py"  # type: ignore
            naive = importlib.util.module_from_spec(importlib.util.spec_from_file_location("naive", path))  # type: ignore
            naive.__spec__.loader.exec_module(naive)  # type: ignore
            form = naive.naive_chunk_linear_attn
            found["fla (its plain chunks)"] = lambda q, k, v: form(F.elu(q) + 1, F.elu(k) + 1, v, normalize=True)
        except (ImportError, AttributeError, FileNotFoundError):
            print("flash-linear-attention: not installed")
    return found


class Peak:
    """Measures how many bytes the peak rises above the memory in use at the start."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(
                0
            )  # give freed memory back to the system, or later allocations would not raise the peak
            Path("/proc/self/clear_refs").write_text("5")
            self.start = self._status("VmRSS")
        return self

    def __exit__(self, *_: Any) -> None:
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else self._status("VmHWM")
        self.bytes = max(peak - self.start, 0)

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def measure(
    side: Side, length: int, device: torch.device, dtype: torch.dtype, clock: Callable[[], float], *, with_peak: bool
) -> tuple[float, int]:
    """Return seconds and, if asked, peak bytes of one forward and backward."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(1, length, HEADS, HEAD_DIM, generator=generator).to(device, dtype).requires_grad_()
        for _ in range(3)
    )
    grad = torch.ones_like(v)
    with Peak(device) if with_peak else contextlib.nullcontext() as peak:
        start = now(device, clock)
        side(q, k, v).backward(grad)
        seconds = now(device, clock) - start
    return seconds, 0 if peak is None else peak.bytes


def now(device: torch.device, clock: Callable[[], float]) -> float:
    """Return the time after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock()


def exponent(points: dict[int, float]) -> float:
    """Return the slope of log time over log length."""
    long = {n: t for n, t in points.items() if n >= 4096}
    chosen = long if len(long) > 2 else points
    xs, ys = [math.log(n) for n in chosen], [math.log(t) for t in chosen.values()]
    if len(xs) < 2:
        return math.nan
    return statistics.linear_regression(xs, ys).slope


def overtakes(fast: dict[int, float], slow: dict[int, float]) -> float | None:
    """Return the length from which `fast` needs less time, by lines between measured lengths in logarithms."""
    both = sorted(set(fast) & set(slow))
    if both and fast[both[0]] < slow[both[0]]:
        return both[0]
    for a, b in itertools.pairwise(both):
        before, after = (math.log(fast[n] / slow[n]) for n in (a, b))
        if before >= 0 > after:
            return math.exp(math.log(a) + (math.log(b) - math.log(a)) * before / (before - after))
    return None


def run_rounds(sides: dict[str, Side], arguments: argparse.Namespace) -> dict[str, dict[int, dict[str, Any]]]:
    """Return seconds of every round and the peak, by side and length."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in sides}
    limits = dict.fromkeys(QUADRATIC, arguments.longest_quadratic) | dict.fromkeys(HUNGRY, arguments.longest_hungry)
    for number in range(arguments.rounds + 1):  # the first round warms up and measures memory, which costs time
        for length in arguments.lengths:
            if number > 2 and length > arguments.many_rounds_up_to:
                continue
            chosen = [name for name in sides if length <= limits.get(name, length)]
            for name in chosen[number % len(chosen) :] + chosen[: number % len(chosen)]:
                seconds, peak = measure(sides[name], length, device, dtype, clock, with_peak=number == 0)
                entry = results[name].setdefault(length, {"seconds": [], "peak_bytes": peak})
                if number:
                    entry["seconds"].append(seconds)
        print(f"round {number}: done", flush=True)
    return results


def report(results: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Print tokens per second, memory, exponents and where each side overtakes SDPA."""
    medians = {n: {t: statistics.median(e["seconds"]) for t, e in by.items()} for n, by in results.items()}
    lengths = sorted({t for by in medians.values() for t in by})
    print(
        "\n| forward + backward, thousand tokens/s |"
        + "".join(f" {t} |" for t in lengths)
        + " exponent | overtakes SDPA at |"
    )
    print("|---|" + "---|" * (len(lengths) + 2))
    for name, by in medians.items():
        cells = "".join(f" {t / by[t] / 1e3:.1f} |" if t in by else " |" for t in lengths)
        crossing = overtakes(by, medians["SDPA"]) if name != "SDPA" else None
        print(f"| {name} |{cells} {exponent(by):.2f} | {'' if crossing is None else f'{crossing:.0f}'} |")
    print("\n| peak memory, MiB |" + "".join(f" {t} |" for t in lengths))
    print("|---|" + "---|" * len(lengths))
    for name, by in results.items():
        cells = "".join(f" {by[t]['peak_bytes'] / 2**20:.0f} |" if t in by else " |" for t in lengths)
        print(f"| {name} |{cells}")
    if not {"softmax rerope", "softmax rope"} <= set(medians):
        return
    ratio = {t: medians["softmax rerope"][t] / medians["softmax rope"][t] for t in medians["softmax rerope"]}
    print("\nrerope over rope, in time: " + ", ".join(f"{r:.2f} at {t}" for t, r in ratio.items()))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--longest-quadratic", type=int, default=16384)
    parser.add_argument("--longest-hungry", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--many-rounds-up-to", type=int, default=8192, help="longer lengths run 2 rounds")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: this process's own seconds")
    parser.add_argument("--sides", nargs="+", help="only these, and SDPA")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    keep_freed_memory()  # as in training on a CPU
    sides = {name: our_side(overrides, device) for name, overrides in SIDES.items()} | peers(device)
    if arguments.sides:
        sides = {name: side for name, side in sides.items() if name in (*arguments.sides, "SDPA")}
    results = run_rounds(sides, arguments)
    report(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
