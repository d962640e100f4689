"""How fast is a training step, compared with litgpt's GPT and transformers' Llama in bare loops?

    python benchmarks/train_step.py --precision bf16 --context 256,512 --rounds 9
    python benchmarks/train_step.py --precision fp32 --compile
    python benchmarks/train_step.py --device cuda --size 124m --vocab 32768 --context 1024 --windows 32 --steps 10

Ours is the whole of `python train.py model/size=small`: real text, the data module, lightning.Trainer, gradient
clipping, every callback and the loggers, taken from inside a run. The peers are a bare loop of forward, backward and
torch's fused AdamW on random tokens, same geometry, same vocabulary, same number of windows, same precision. Each side
lives in a process of its own, of which one works at a time: a round runs every side for some steps in an order that
rotates. Speeds are medians over rounds, ratios are taken within a round; quartiles are given. The ceiling is the rate
of one large product, measured between the rounds. Memory is the peak resident size of the process, minus its memory
before building its model; on a GPU, the peak of allocated memory. Peers that are not installed are skipped
(`pip install litgpt transformers`).
"""

import argparse
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

ROOT = Path(__file__).resolve().parents[1]
SIDES = {"crucible": None, "litgpt": "litgpt", "transformers": "transformers"}


def shape_of(size: str) -> dict[str, Any]:
    """Return the keys of a size in conf/."""
    return yaml.safe_load((ROOT / f"conf/model/size/{size}.yaml").read_text())


def peak_memory(device: str) -> float:
    """Peak of this process, MiB: allocated on the GPU, or resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # counted in KiB


class Turns:
    """One side of the exchange with the parent: reads a number of steps, and writes seconds and memory.

    Answers go to the standard output that the process was started with; all else that is printed goes to its errors.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self.before = peak_memory(device)
        self.left = 0
        self.start: float | None = None

    def next_step(self) -> None:
        """Call before each step: report when the requested steps are done, and wait for the next request."""
        if self.left == 0:
            if self.device == "cuda":
                torch.cuda.synchronize()
            if self.start is not None:
                seconds, memory = time.perf_counter() - self.start, peak_memory(self.device) - self.before
                print(seconds, memory, file=self.answers, flush=True)
            line = sys.stdin.readline()
            if not line:
                raise SystemExit
            self.left, self.start = int(line), time.perf_counter()
        self.left -= 1


def peer_model(args: argparse.Namespace) -> tuple[torch.nn.Module, Callable[..., torch.Tensor]]:
    """Return a peer's model of our geometry, and how it gives logits."""
    shape = shape_of(args.size)
    if args.worker == "litgpt":
        from litgpt.config import Config
        from litgpt.model import GPT

        config = Config(
            block_size=args.context,
            vocab_size=args.vocab,
            padded_vocab_size=args.vocab,
            n_layer=shape["num_layers"],
            n_head=shape["num_heads"],
            n_query_groups=shape["num_kv_heads"],
            n_embd=shape["d_model"],
            intermediate_size=shape["ffn"]["d_ff"],
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
        )
        model = GPT(config)
        model.lm_head.weight = model.transformer.wte.weight
        return model, lambda run, ids: run(ids)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=shape["d_model"],
        intermediate_size=shape["ffn"]["d_ff"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config), lambda run, ids: run(input_ids=ids).logits


def train_peer(args: argparse.Namespace) -> None:
    """Train a peer in a bare loop."""
    importlib.import_module(args.worker)
    turns = Turns(args.device)
    model, logits_of = peer_model(args)
    model = model.to(args.device)
    run = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    while True:
        turns.next_step()
        ids = torch.randint(0, args.vocab, (args.windows, args.context + 1), device=args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            logits = logits_of(run, ids[:, :-1]).reshape(-1, args.vocab)
            loss = F.cross_entropy(logits, ids[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_ours(args: argparse.Namespace) -> None:
    """Train as `python train.py` does, each step waiting for its turn."""
    import lightning as L
    from hydra import compose, initialize_config_dir

    from llm.config.files import to_plain
    from llm.training import module_and_trainer
    from llm.training.train import train

    precision = "bf16-mixed" if args.precision == "bf16" else "32-true"
    overrides = [
        f"model/size={args.size}",
        f"trainer={'gpu' if args.device == 'cuda' else 'cpu'}",
        "name=train-step",
        f"tokenizer.vocab_size={args.vocab}",
        f"trainer.precision={precision}",
        f"context_length={args.context}",
        f"batch_tokens={args.windows * args.context}",
        f"micro_batch_size={args.windows}",
        f"compile={str(args.compile).lower()}",
        "max_steps=100000",
        "val_every=100000",
        "checkpoint_every=100000",
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = to_plain(compose("train", overrides))
    turns = Turns(args.device)

    class Gate(L.Callback):
        """Blocks the run until its turn; it is the first callback, so that the time of all others counts."""

        def on_train_batch_start(self, *_: Any) -> None:
            turns.next_step()

    build = module_and_trainer.build_callbacks
    module_and_trainer.build_callbacks = lambda *a, **o: [Gate(), *build(*a, **o)]
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        train(cfg, Path(folder) / "run")


def ask(process: subprocess.Popen, steps: int) -> tuple[float, float]:
    """Let a side take steps; return seconds and MiB."""
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    seconds, mebibytes = process.stdout.readline().split()
    return float(seconds), float(mebibytes)


def compare(args: argparse.Namespace, context: int) -> None:
    """Run every side in turns and print a table."""
    sides = [name for name, module in SIDES.items() if module is None or importlib.util.find_spec(module)]
    options = [sys.executable, __file__, *sys.argv[1:], "--context", str(context)]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "cwd": ROOT,
        "env": {**os.environ, "PYTHONPATH": str(ROOT)},
    }
    if not args.verbose:
        pipes["stderr"] = subprocess.DEVNULL
    processes = {side: subprocess.Popen([*options, "--worker", side], **pipes) for side in sides}
    for process in processes.values():
        ask(process, args.warmup)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    memory: dict[str, float] = {}
    ceilings = []
    for turn in range(args.rounds):
        ceilings.append(ceiling(args))
        for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
            taken, memory[side] = ask(processes[side], args.steps)
            seconds[side].append(taken / args.steps)
    for process in processes.values():
        process.kill()
    report(args, context, seconds, memory, ceilings)


def ceiling(args: argparse.Namespace) -> float:
    """FLOP/s of a square product in the precision at hand, by the better of torch's product and ours."""
    from llm.ops.products import product_nt

    torch.set_num_threads(args.threads)
    size, dtype = 8192 if args.device == "cuda" else 2048, torch.bfloat16 if args.precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, dtype=dtype, device=args.device)
    wait, seconds = torch.cuda.synchronize if args.device == "cuda" else lambda: None, []
    for product in (F.linear, product_nt) * 3:
        wait()
        start = time.perf_counter()
        product(a, b)
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def flops_per_token(args: argparse.Namespace, context: int) -> float:
    """Return the training FLOPs per token: six per weight that multiplies, plus the causal products of attention."""
    shape = shape_of(args.size)
    layers, width, kv_share = shape["num_layers"], shape["d_model"], shape["num_kv_heads"] / shape["num_heads"]
    weights = layers * ((2 + 2 * kv_share) * width**2 + 3 * width * shape["ffn"]["d_ff"]) + args.vocab * width
    return 6.0 * weights + 3 * layers * 4.0 * width * (context + 1) / 2


def report(
    args: argparse.Namespace,
    context: int,
    seconds: dict[str, list[float]],
    memory: dict[str, float],
    ceilings: list[float],
) -> None:
    """Print tokens per second, memory, our speed over each peer's, and the share of the ceiling that is reached."""
    tokens, peak = args.windows * context, statistics.median(ceilings)
    mode = "compiled" if args.compile else "eager"
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    print(
        f"\n{args.size}, {args.precision}, {mode}, {args.windows} windows of {context}, {where}, {args.rounds} rounds"
    )
    heads = f"{'':13}{'tokens/s':>10}{'quartiles':>16}{'peak MiB':>10}{'of ceiling':>12}{'ours/theirs':>13}"
    print(f"{heads}{'quartiles':>14}")
    for side, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(times, seconds["crucible"], strict=True)]
        speed, ratio = [tokens / t for t in times], statistics.quantiles(ratios, n=4)
        low, middle, high = statistics.quantiles(speed, n=4)
        spread, ratio_spread = f"{low:.0f} - {high:.0f}", f"{ratio[0]:.2f} - {ratio[2]:.2f}"
        share = middle * flops_per_token(args, context) / peak
        print(
            f"{side:13}{middle:10.0f}{spread:>16}{memory[side]:10.0f}{share:12.0%}{ratio[1]:13.2f}{ratio_spread:>14}",
            flush=True,
        )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", default="small", choices=sorted(f.stem for f in (ROOT / "conf/model/size").iterdir()))
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--context", default="256,512", help="lengths, separated by commas")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1, help="steps per side and round")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--verbose", action="store_true", help="show what the sides write to standard error")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.context = int(args.context)
        torch.set_num_threads(args.threads)
        train_ours(args) if args.worker == "crucible" else train_peer(args)
    else:
        for context in args.context.split(","):
            compare(args, int(context))


if __name__ == "__main__":
    main()
