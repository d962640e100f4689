"""How fast is a mixture-of-experts layer beside a dense layer of the same active FLOPs, which is its bound?

    python benchmarks/moe.py --device cpu --rounds 15
    python benchmarks/moe.py --device cuda --precisions bf16-mixed --tokens 16384 --d-model 2048 --width 1408

Each round runs forward and backward of every side once, in an order that rotates: the layer of this project in
training, transformers' Mixtral block with the same weights, as a loop and as grouped products, and the dense layer.
Outputs are compared before any time is taken, and --warmup rounds go untimed: how many tokens an expert has differs
from step to step, and the first product of a new shape is compiled, which a run of thousands of steps does not notice.
Shares of the bound are medians over rounds of (time of the dense layer / time of the side) within a round, with
quartiles.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from llm.allocator import keep_freed_memory
from llm.ffn.balance.loss_free import LossFree
from llm.ffn.moe import MoE
from llm.ffn.router import TopKRouter
from llm.ffn.swiglu import SwiGLU

SHAPES = {"8 experts, top 2": (8, 2, 1), "64 small experts, top 8": (64, 8, 4)}
"""Experts, experts a token, and how many times narrower than --width each is."""


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


def sides(d_model: int, width: int, num_experts: int, top_k: int) -> dict[str, nn.Module]:
    """Return the layers to compare, by name."""
    ours = our_layer(d_model, width, num_experts, top_k)
    return {
        "dense": SwiGLU(d_model=d_model, d_ff=top_k * width),
        "ours": ours,
        "transformers, loop": mixtral_block(ours, d_model, top_k, "eager"),
        "transformers, grouped": mixtral_block(ours, d_model, top_k, "grouped_mm"),
    }


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


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(shape: str, precision: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return the times of each side, a round each."""
    num_experts, top_k, narrower = SHAPES[shape]
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    layers = {
        name: layer.to(arguments.device, dtype).train()
        for name, layer in sides(arguments.d_model, arguments.width // narrower, num_experts, top_k).items()
    }
    shape_of_x = (8, arguments.tokens // 8, arguments.d_model)
    x = torch.randn(shape_of_x, device=arguments.device, dtype=dtype).requires_grad_()
    grad = torch.randn_like(x)
    outputs = {name: run_once(layer, x, grad, precision).float() for name, layer in layers.items()}
    for name in ("transformers, loop", "transformers, grouped"):
        error = float((outputs[name] - outputs["ours"]).norm() / outputs["ours"].norm())
        # bf16 routers send some tokens elsewhere; in fp32 only the order of sums differs
        assert error < (1e-4 if precision == "32" else 0.2), f"{name} computes something else: {error}"
    times: dict[str, list[float]] = {name: [] for name in layers}
    names = list(layers)
    for turn in range(arguments.warmup + arguments.rounds):
        x = torch.randn_like(x).requires_grad_()  # loads differ from step to step, and with them the shapes of products
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            call = partial(run_once, layers[name], x, grad, precision)
            elapsed = seconds(call, arguments.device)
            if turn >= arguments.warmup:
                times[name].append(elapsed)
    return times


def report(shape: str, precision: str, times: dict[str, list[float]], tokens: int) -> None:
    """Print tokens a second and the share of the bound of each side."""
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
    parser.add_argument("--width", type=int, default=1024, help="of an expert where there are 8")
    parser.add_argument("--precisions", nargs="+", default=["32", "bf16-mixed", "bf16-true"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=8)
    arguments = parser.parse_args()
    keep_freed_memory()  # as training on a CPU does
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments}")
    print(f"{'shape':26s} {'precision':10s} {'side':22s} {'tokens/s':>12s}  share of dense [quartiles]")
    for shape in arguments.shapes:
        for precision in arguments.precisions:
            report(shape, precision, measure(shape, precision, arguments), arguments.tokens)


if __name__ == "__main__":
    main()
