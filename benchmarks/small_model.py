"""How long is an update of a very small model, compared with a bare loop of the same geometry?

    python benchmarks/small_model.py --precision fp32 --blocks 7
    python benchmarks/small_model.py --precision bf16 --nanogpt ../nanoGPT

The model is that of nanoGPT's recipe for a CPU: 4 layers of width 128 with 4 heads, 12 windows of 64 bytes. Ours is the
whole of `python train.py`: lightning.Trainer, clipping, callbacks and loggers. The bare loop is written in this file:
LayerNorm, GELU and learned positions as nanoGPT has them, SDPA, F.cross_entropy over all scores, clipping, and torch's
fused AdamW. `--nanogpt` names a checkout whose model.py runs in the same loop. `--peel` also times ours without its
callbacks and loggers, and without Lightning, so that the cost of each is seen.

Each side has a process of its own, of which one works at a time. A block runs every side for some updates, in an order
that rotates. Printed are the median and the smallest time per update over blocks, quartiles, and ratios within a block.
"""

import argparse
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_step import ROOT, Turns, ask

LAYERS, WIDTH, HEADS, CONTEXT, WINDOWS, VOCABULARY = 4, 128, 4, 64, 12, 256

OVERRIDES = [
    "trainer=cpu",
    "name=small-model",
    "tokenizer=bytes",
    f"model.num_layers={LAYERS}",
    f"model.d_model={WIDTH}",
    f"model.num_heads={HEADS}",
    f"context_length={CONTEXT}",
    f"batch_tokens={WINDOWS * CONTEXT}",
    f"micro_batch_size={WINDOWS}",
    "max_steps=1000000",
    "val_every=1000000",
    "checkpoint_every=1000000",
]


class BareLayer(nn.Module):
    """A pre-norm layer as nanoGPT has it, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = (nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after the layer."""
        batch, time, _ = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, time, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, WIDTH))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class BareModel(nn.Module):
    """A decoder with learned positions and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers, self.norm = nn.ModuleList(BareLayer() for _ in range(LAYERS)), nn.LayerNorm(WIDTH, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores and the loss."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        scores = F.linear(self.norm(x), self.tokens.weight)
        return scores, F.cross_entropy(scores.view(-1, VOCABULARY), labels.view(-1))


def nanogpt_model(checkout: str) -> nn.Module:
    """Return the model of a nanoGPT checkout."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(checkout) / "model.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"--nanogpt={checkout}: has no model.py; name a checkout of nanoGPT")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    settings = {"block_size": CONTEXT, "vocab_size": VOCABULARY, "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH}
    return module.GPT(module.GPTConfig(**settings, dropout=0.0, bias=False))


def train_bare(args: argparse.Namespace, model: nn.Module) -> None:
    """Train in a loop of as few lines as it takes, on the bytes of this Python's own sources."""
    turns = Turns("cpu")
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py"))[:80])
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
    while True:
        turns.next_step()
        starts = torch.randint(len(data) - CONTEXT - 1, (WINDOWS,)).tolist()
        rows = torch.stack([data[i : i + CONTEXT + 1].long() for i in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            _, loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def our_config(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Return our configuration as a plain dictionary."""
    from hydra import compose, initialize_config_dir

    from llm.config.files import to_plain

    precision = "bf16-mixed" if args.precision == "bf16" else "32-true"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return to_plain(compose("train", [*OVERRIDES, f"trainer.precision={precision}", *args.override, *more]))


def train_whole(args: argparse.Namespace) -> None:
    """Train as `python train.py` does; the side `without callbacks` keeps the loop of Lightning alone."""
    import lightning as L

    from llm.training import module_and_trainer
    from llm.training.train import train

    cfg = our_config(args)
    if args.worker == "without callbacks":
        cfg |= {"callbacks": {}, "logger": None}
    turns = Turns("cpu")

    class Gate(L.Callback):
        """Blocks the run until its turn; it is the first callback, so that the time of all others counts."""

        def on_train_batch_start(self, *_: Any) -> None:
            turns.next_step()

    build = module_and_trainer.build_callbacks
    module_and_trainer.build_callbacks = lambda *a, **o: [Gate(), *build(*a, **o)]
    with tempfile.TemporaryDirectory(prefix="small-model-") as folder:
        train(cfg, Path(folder) / "run")


def train_model_alone(args: argparse.Namespace) -> None:
    """Train our model, loss and optimizer in the bare loop."""
    from llm.config.build import build_model, module_factories
    from llm.config.check import check
    from llm.ops.allocator import keep_freed_memory
    from llm.training.learning_rate import rated_groups

    keep_freed_memory()
    checked = check(our_config(args))
    model = build_model(checked.tree, VOCABULARY)
    factories = module_factories(checked.tree, checked.sizes.ramp)
    groups = rated_groups(model, **{key: factories[key] for key in ("rates", "optimizer", "lr", "weight_decay")})
    turns, optimizer = Turns("cpu"), factories["optimizer"](groups)
    ids = torch.randint(0, VOCABULARY, (WINDOWS, CONTEXT + 1))
    positions, documents = torch.arange(CONTEXT).expand(WINDOWS, -1), torch.zeros(WINDOWS, CONTEXT, dtype=torch.long)
    while True:
        turns.next_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            out = model(ids[:, :-1], positions=positions, document_ids=documents)
            loss = model.loss(out.hidden, ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def work(args: argparse.Namespace) -> None:
    """Be one side."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.worker == "bare loop":
        train_bare(args, BareModel())
    elif args.worker == "nanoGPT":
        train_bare(args, nanogpt_model(args.nanogpt))
    elif args.worker == "our model alone":
        train_model_alone(args)
    else:
        train_whole(args)


def compare(args: argparse.Namespace) -> None:
    """Run every side in turns and print a table."""
    sides = ["crucible", "bare loop", *(["nanoGPT"] if args.nanogpt else [])]
    sides += ["without callbacks", "our model alone"] if args.peel else []
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    pipes["env"] = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes["stderr"] = None if args.verbose else subprocess.DEVNULL
    processes = {side: subprocess.Popen([*command, side], **pipes) for side in sides}
    times: dict[str, list[float]] = {side: [] for side in sides}
    try:
        for process in processes.values():
            ask(process, args.warmup)
        for turn in range(args.blocks):
            shift = turn % len(sides)
            for side in sides[shift:] + sides[:shift]:
                times[side].append(1000 * ask(processes[side], args.updates)[0] / args.updates)
    finally:
        for process in processes.values():
            process.kill()
    print(f"{args.precision}, {args.threads} threads, {args.blocks} blocks of {args.updates} updates, ms per update")
    print(f"{'':20}{'median':>9}{'quartiles':>16}{'smallest':>10}{'theirs/ours':>13}{'of the smallest':>17}")
    for side, own in times.items():
        low, middle, high = statistics.quantiles(own, n=4) if len(own) > 1 else (math.nan, own[0], math.nan)
        ratio = statistics.median(theirs / ours for theirs, ours in zip(own, times["crucible"], strict=True))
        least = min(own) / min(times["crucible"])
        spread = f"{low:.1f} - {high:.1f}"
        print(f"{side:20}{middle:9.1f}{spread:>16}{min(own):10.1f}{ratio:13.2f}{least:17.2f}", flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--updates", type=int, default=50, help="updates per side and block")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--nanogpt", help="folder of a nanoGPT checkout")
    parser.add_argument("--peel", action="store_true", help="also time ours without callbacks, and without Lightning")
    parser.add_argument("--override", nargs="*", default=[], help="overrides of our configuration")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--verbose", action="store_true", help="show what the sides write to standard error")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work(args) if args.worker else compare(args)


if __name__ == "__main__":
    main()
