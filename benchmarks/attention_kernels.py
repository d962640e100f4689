"""How fast is causal attention, forward and backward, compared with torch's SDPA, with and without documents?

    python benchmarks/attention_kernels.py --dtype bfloat16 --rounds 15
    python benchmarks/attention_kernels.py --device cuda --times 1024,4096 --tokens 65536

Sides: the kernel that `causal_attention` picks, with one document per row and with documents of about 300 tokens;
`scaled_dot_product_attention` with `is_causal` (one document per row) and with a boolean mask (documents); and the
plain product form, which stores the whole matrix of scores. A round runs every side once in an order that rotates.
Figures are medians over rounds, with quartiles; ratios are taken within a round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llm.model.attention.kernels import causal_attention, reference_attention
from llm.model.attention.kernels.reference import visible_keys

DOCUMENT_TOKENS = 300


def sides(batch: int, time_: int, head_dim: int, device: str) -> dict[str, Callable[..., Tensor]]:
    """Return the compared functions by name; each is called with q, k and v."""
    scale = head_dim**-0.5
    random = torch.Generator().manual_seed(0)
    documents = (torch.rand(batch, time_, generator=random) < 1 / DOCUMENT_TOKENS).long().cumsum(1).to(device)
    visible = visible_keys(time=time_, time_k=time_, device=documents.device, document_ids=documents, window=None)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)

    return {
        "ours": lambda q, k, v: causal_attention(q, k, v, scale=scale),
        "ours, documents": lambda q, k, v: causal_attention(q, k, v, scale=scale, document_ids=documents),
        "SDPA": lambda q, k, v: sdpa(q, k, v, is_causal=True),
        "SDPA, documents": lambda q, k, v: sdpa(q, k, v, attn_mask=visible[:, None]),
        "plain": lambda q, k, v: reference_attention(q, k, v, scale=scale),
    }


def timed(side: Callable[..., Tensor], inputs: list[Tensor], slope: Tensor) -> tuple[float, float]:
    """Seconds forward and backward."""
    wait = torch.cuda.synchronize if slope.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    out = side(*inputs)
    wait()
    middle = time.perf_counter()
    torch.autograd.grad(out, inputs, slope)
    wait()
    return middle - start, time.perf_counter() - middle


def compare(args: argparse.Namespace, time_: int) -> None:
    """Time every side at one length and print a table."""
    batch, dtype = max(1, args.tokens // time_), getattr(torch, args.dtype)
    shape = (batch, time_, args.heads, args.head_dim)
    inputs = [torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True) for _ in range(3)]
    slope = torch.randn(shape, device=args.device, dtype=dtype)
    compared = sides(batch, time_, args.head_dim, args.device)
    names, seconds = list(compared), {name: [] for name in compared}
    for turn in range(args.rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = timed(compared[name], inputs, slope)
            if turn:  # the first round warms up
                seconds[name].append(taken)
    print(f"\n{args.dtype}, {batch} rows of {time_}, {args.heads} heads of {args.head_dim}, {args.rounds} rounds")
    print(f"{'':16}{'forward ms':>11}{'backward ms':>12}{'SDPA/side':>11}{'quartiles':>14}")
    for name, taken in seconds.items():
        forward, backward = (statistics.median(part) * 1e3 for part in zip(*taken, strict=True))
        ratios = [sum(sdpa) / sum(own) for sdpa, own in zip(seconds["SDPA"], taken, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:16}{forward:11.1f}{backward:12.1f}{middle:11.2f}{f'{low:.2f} - {high:.2f}':>14}", flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--times", default="256,512,2048", help="lengths, separated by commas")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for time_ in args.times.split(","):
        compare(args, int(time_))


if __name__ == "__main__":
    main()
