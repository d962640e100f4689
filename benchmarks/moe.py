"""How fast is a mixture-of-experts layer, relative to a dense layer with the same active FLOPs?

    python benchmarks/moe.py --device cpu --rounds 15
    python benchmarks/moe.py --device cuda --precisions bf16-mixed --tokens 16384 --d-model 2048 --width 1408

Sides are the layer of this project in training, transformers' Mixtral block with the same weights, as a loop and as
grouped products, and the dense layer. Each lives in a process of its own, as a training does, of which one works at a
time: in a common one, the shapes of products that one side brings push those of another out of oneDNN's cache, and its
blocks of memory scatter the other's. A round gives every side --steps steps, forward and backward, in an order that
rotates. Outputs are compared before any time is taken, and --warmup rounds go untimed: how many tokens an expert has
differs from step to step, and the first product of a new shape is compiled, which a run of thousands of steps does not
notice. Shares of the bound are medians over rounds of (time of the dense layer / time of the side) within a round,
with quartiles.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection

import torch
from torch import Tensor, multiprocessing, nn

from llm.model.ffn.balance.loss_free import LossFree
from llm.model.ffn.moe import MoE
from llm.model.ffn.router import TopKRouter
from llm.model.ffn.swiglu import SwiGLU
from llm.ops.allocator import keep_freed_memory
from llm.ops.products import keep_compiled_products

SHAPES = {"8 experts, top 2": (8, 2, 1), "64 small experts, top 8": (64, 8, 4)}
"""Number of experts, experts per token, and how many times narrower than --width each is."""

SIDES = ("dense", "ours", "transformers, loop", "transformers, grouped")
"""The compared sides; the first is the bound."""


def our_layer(d_model: int, width: int, num_experts: int, top_k: int) -> MoE:
    """Return the layer with the router of Mixtral and loss-free balance."""
    router = partial(TopKRouter, scores="softmax", normalize=True, routed_scale=1.0)
    return MoE(
        d_model=d_model,
        d_ff=width,
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=0,
        match="none",
        normalize_outputs=False,
        z_loss=0.0,
        router=router,
        balance=partial(LossFree, rate=1e-3, rule="sign"),
    )


def mixtral_block(ours: MoE, d_model: int, top_k: int, implementation: str) -> nn.Module:
    """Return transformers' block with the weights of `ours`."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=d_model,
        intermediate_size=ours.d_expert,
        num_local_experts=ours.num_experts,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    experts = ours.experts
    state = {
        "gate.weight": ours.router.proj.weight,
        "experts.gate_up_proj": torch.cat([experts.gate_proj.weight, experts.up_proj.weight], dim=1),
        "experts.down_proj": experts.down_proj.weight,
    }
    block.load_state_dict(state)
    return block


def layer_of(side: str, d_model: int, width: int, num_experts: int, top_k: int) -> nn.Module:
    """Return the layer of a side; the weights of all but the dense one are the same."""
    if side == "dense":
        return SwiGLU(d_model=d_model, d_ff=top_k * width)
    ours = our_layer(d_model, width, num_experts, top_k)
    implementations = {"transformers, loop": "eager", "transformers, grouped": "grouped_mm"}
    return ours if side == "ours" else mixtral_block(ours, d_model, top_k, implementations[side])


@contextlib.contextmanager
def in_precision(precision: str, device: str) -> Iterator[None]:
    """Autocast where the precision is mixed."""
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
        yield


def run_once(layer: nn.Module, x: Tensor, grad: Tensor, precision: str) -> Tensor:
    """Run forward and backward with fresh gradients; return the output."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    with in_precision(precision, x.device.type):
        y = layer(x)
    y = y if isinstance(y, Tensor) else y.hidden
    y.backward(grad.to(y.dtype))
    return y.detach()


def work(side: str, shape: str, precision: str, arguments: argparse.Namespace, pipe: Connection) -> None:
    """Send the output of a first step, then, each time something arrives, the seconds that --steps steps take."""
    keep_freed_memory()  # as in training on a CPU
    keep_compiled_products()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    num_experts, top_k, narrower = SHAPES[shape]
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    layer = layer_of(side, arguments.d_model, arguments.width // narrower, num_experts, top_k)
    layer = layer.to(arguments.device, dtype).train()
    torch.manual_seed(1)
    options = {"device": arguments.device, "dtype": dtype}
    grad, *inputs = torch.randn(1 + arguments.steps, 8, arguments.tokens // 8, arguments.d_model, **options)
    pipe.send(run_once(layer, inputs[0].requires_grad_(), grad, precision).float().cpu().numpy())
    wait = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None
    while pipe.recv():
        # loads differ from step to step, and with them the shapes of products
        inputs = [torch.randn_like(x).requires_grad_() for x in inputs]
        wait()
        start = time.perf_counter()
        for x in inputs:
            run_once(layer, x, grad, precision)
        wait()
        pipe.send((time.perf_counter() - start) / arguments.steps)


def measure(shape: str, precision: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds that a step of each side takes, one value per round."""
    spawn, pipes = multiprocessing.get_context("spawn"), {}
    for side in arguments.sides:
        pipes[side], theirs = spawn.Pipe()
        spawn.Process(target=work, args=(side, shape, precision, arguments, theirs), daemon=True).start()
        theirs.close()  # so that reading below ends if the side fails
    outputs = {side: torch.from_numpy(pipe.recv()) for side, pipe in pipes.items()}
    for side in outputs.keys() - {"dense", "ours"}:
        error = float((outputs[side] - outputs["ours"]).norm() / outputs["ours"].norm())
        # bf16 routers send some tokens elsewhere; in fp32 only the order of sums differs
        assert error < (1e-4 if precision == "32" else 0.2), f"{side} computes something else: {error}"
    times: dict[str, list[float]] = {side: [] for side in pipes}
    for turn in range(arguments.warmup + arguments.rounds):
        first = turn % len(pipes)
        for side in [*pipes][first:] + [*pipes][:first]:
            pipes[side].send(True)
            elapsed = pipes[side].recv()
            if turn >= arguments.warmup:
                times[side].append(elapsed)
    for pipe in pipes.values():
        pipe.send(False)
    return times


def report(shape: str, precision: str, times: dict[str, list[float]], tokens: int) -> None:
    """Print tokens per second and the share of the bound of each side."""
    for name, values in times.items():
        shares = [bound / value for bound, value in zip(times["dense"], values, strict=True)]
        low, median, high = statistics.quantiles(shares, n=4)
        rate = tokens / statistics.median(values)
        print(f"{shape:26s} {precision:10s} {name:22s} {rate:12,.0f}  {median:6.3f}  [{low:.3f}, {high:.3f}]")


def main() -> None:
    """Measure every shape in every precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024, help="width of an expert when there are 8")
    parser.add_argument("--precisions", nargs="+", default=["32", "bf16-mixed", "bf16-true"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES, help="dense and ours, and others or none")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="steps a side takes in a round")
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if not {"dense", "ours"} <= set(arguments.sides):
        parser.error(f"--sides {' '.join(arguments.sides)}: must hold dense, the bound, and ours")
    print(f"torch {torch.__version__}, {arguments}")
    print(f"{'shape':26s} {'precision':10s} {'side':22s} {'tokens/s':>12s}  share of dense [quartiles]")
    for shape in arguments.shapes:
        for precision in arguments.precisions:
            report(shape, precision, measure(shape, precision, arguments), arguments.tokens)


if __name__ == "__main__":
    main()
