"""The operations of a run that have several kernels on a CPU, at the sizes of the run, ready to be timed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm.config.checked import CheckedConfig
from llm.config.pieces import piece_at
from llm.model.attention.kernels import causal_attention
from llm.model.attention.softmax import SoftmaxAttention
from llm.model.transformer import Transformer
from llm.ops.kernel_choice import DEFAULT, NAMES, NEVER, KernelChoice, using
from llm.ops.linear_layer import linear_product
from llm.ops.precision import cpu_multiplies_bf16
from llm.ops.products import HAS_ONEDNN, onednn_product
from llm.ops.tuning import Operation
from llm.optim.newton_schulz import orthogonalize
from llm.optim.threads import side_by_side
from llm.scaling.suitability import traits_of

TIMED_PRODUCT = 1 << 26
"""Multiplications of a timed product at most: a few milliseconds."""
TIMED_TOKENS = 1024
"""Tokens of a timed attention at most; at least one window."""
ALL_MKL = {name: "mkl" for name in NAMES if name.startswith("product_") and name != "product_reading"}
"""The choice of MKL for each product of training."""
DOCUMENT = 300
"""Mean tokens per document in a timed attention with documents."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of a run's operations.

    Args:
        windows: windows per micro-batch.
        context_length: tokens per window.
        matrices: the shapes of the projections of a layer, [outputs, inputs], each once.
        heads: query heads, key/value heads and head size of softmax attention without a window; None without such.
        precision: Lightning's name of the arithmetic.
        muon_sizes: smaller sides of the matrices that Muon orthogonalises; empty for other optimizers.
    """

    windows: int
    context_length: int
    matrices: tuple[tuple[int, int], ...]
    heads: tuple[int, int, int] | None
    precision: str
    muon_sizes: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products of attention."""
        return torch.bfloat16 if "bf16" in self.precision else torch.float32


def workload_of(checked: CheckedConfig, model: Transformer) -> Workload:
    """Return the sizes of a run's operations."""
    plan, optimizer = checked.sizes.plan, checked.tree["optimizer"]
    matrices = [p for layer in model.blocks() for p in layer.parameters() if p.ndim >= 2]
    attentions = [m for m in model.modules() if isinstance(m, SoftmaxAttention) and m.window is None]
    traits = traits_of(piece_at(optimizer["_target_"]))
    is_muon = traits is not None and traits.orthogonalizes and optimizer.get("matmul_dtype") == "auto"
    return Workload(
        windows=plan.micro_batch_size,
        context_length=plan.context_length,
        matrices=tuple(sorted({(p.shape[-2], p.shape[-1]) for p in matrices})),
        heads=next(((m.num_heads, m.num_kv_heads, m.head_dim) for m in attentions), None),
        precision=checked.sizes.precision,
        muon_sizes=tuple(sorted({min(p.shape[-2:]) for p in matrices})) if is_muon else (),
    )


def operations_of(workload: Workload) -> list[Operation]:
    """Return the operations to time, with the default kernel of each first."""
    return [*_products(workload), *_attentions(workload), *_orthogonalizations(workload)]


def _products(workload: Workload) -> Iterator[Operation]:
    """Yield the products of linear layers in fp32, forward and backward; other dtypes have one library.

    A candidate multiplies with every projection of a layer, because the faster library depends on the shape.
    """
    if workload.precision != "32-true" or not HAS_ONEDNN or not workload.matrices:
        return
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in NAMES if name.startswith("product_")}
    for outputs, inputs in workload.matrices:
        rows = max(64, TIMED_PRODUCT // (inputs * outputs))
        rows = min(rows, workload.windows * workload.context_length)
        x, grad, weight = torch.randn(rows, inputs), torch.randn(rows, outputs), torch.randn(outputs, inputs)
        pairs["product_forward"].append((x, weight))
        pairs["product_grad_input"].append((grad, weight.t()))
        pairs["product_grad_weight"].append((grad.t(), x.t()))
        pairs["product_reading"].append((x[:1].expand(8, -1).contiguous(), weight))
    libraries = {"onednn": onednn_product, "mkl": _mkl}
    for name, operands in pairs.items():
        calls = {library: partial(_multiply, product, operands) for library, product in libraries.items()}
        yield Operation(name=name, candidates=calls)


def _multiply(product: Callable[[Tensor, Tensor], Tensor], operands: list[tuple[Tensor, Tensor]]) -> None:
    for a, b in operands:
        product(a, b)


def whole_layers(workload: Workload, mixed: Mapping[str, Any]) -> Operation:
    """Return the linear layers of a decoder, forward and backward, with products of both libraries or of MKL alone.

    A layer whose products are all MKL's is torch's own function, with no operator around it.
    """
    layers = []
    for outputs, inputs in workload.matrices:
        rows = min(max(64, TIMED_PRODUCT // (inputs * outputs)), workload.windows * workload.context_length)
        shapes = ((rows, inputs), (outputs, inputs))
        layers.append(tuple(torch.randn(shape, requires_grad=True) for shape in shapes))
    kernels = {name: replace(DEFAULT, **dict(mixed) | library) for name, library in (("mixed", {}), ("mkl", ALL_MKL))}
    return Operation(name="layers", candidates={n: partial(_train_layers, layers, k) for n, k in kernels.items()})


def _train_layers(layers: list[tuple[Tensor, ...]], kernels: KernelChoice) -> None:
    with using(kernels), torch.enable_grad():
        for x, weight in layers:
            y = linear_product(x, weight)
            torch.autograd.grad(y, (x, weight), y.detach())


def _mkl(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.t()


def _attentions(workload: Workload) -> Iterator[Operation]:
    """Yield attention over short rows whose documents differ, or else over long rows of one document."""
    if workload.heads is None:
        return
    heads, kv_heads, head_dim = workload.heads
    time, dtype = workload.context_length, workload.dtype
    rows = max(1, min(workload.windows, TIMED_TOKENS // time))
    inputs = [
        torch.randn(rows, time, n, head_dim, dtype=dtype, requires_grad=True) for n in (heads, kv_heads, kv_heads)
    ]
    is_short, ids = time <= DEFAULT.short_row, None
    if is_short:
        chance = torch.rand(rows, time, generator=torch.Generator().manual_seed(0))
        ids = (chance < 1 / min(DOCUMENT, time)).cumsum(1)
    kernels = {name: replace(DEFAULT, attention=name) for name in ("blocked", "sdpa")}
    yield Operation(name="attention", candidates={n: _attention(inputs, ids, kernel) for n, kernel in kernels.items()})
    if is_short and rows > 1:
        calls = {n: _attention(inputs, ids, replace(DEFAULT, short_row=n)) for n in (DEFAULT.short_row, 0)}
        yield Operation(name="short_row", candidates=calls)


def _attention(inputs: list[Tensor], document_ids: Tensor | None, kernels: Any) -> Callable[[], Any]:
    q, k, v = inputs

    def call() -> None:
        with using(kernels), torch.enable_grad():
            out = causal_attention(q, k, v, document_ids=document_ids, scale=q.shape[-1] ** -0.5)
        assert isinstance(out, Tensor)
        torch.autograd.grad(out, inputs, out.detach())

    return call


def _orthogonalizations(workload: Workload) -> Iterator[Operation]:
    """Yield Muon's products in bf16 from each size of matrix on, and in fp32 for all.

    Each candidate orthogonalises one square matrix of every size per thread, as the optimizer does side by side.
    """
    if not workload.muon_sizes or not cpu_multiplies_bf16():
        return
    threads = torch.get_num_threads()
    matrices = [torch.randn(threads, size, size) for size in workload.muon_sizes]

    def call(smallest: int) -> None:
        for stack in matrices:
            dtype = torch.bfloat16 if stack.shape[-1] >= smallest else torch.float32
            side_by_side(lambda x, dtype=dtype: _orthogonalize(x, dtype), list(stack))

    sizes = dict.fromkeys((0, *workload.muon_sizes[1:], NEVER))
    yield Operation(name="muon_bf16_from", candidates={size: partial(call, size) for size in sizes})


def _orthogonalize(x: Tensor, dtype: torch.dtype) -> None:
    orthogonalize(x, iteration="quintic", dtype=dtype)
