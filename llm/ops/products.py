"""Matrix products in fp32 on a CPU by oneDNN, where torch would call MKL.

On some processors (AMD with AVX-512) oneDNN multiplies fp32 up to twice as fast as MKL at the same precision, on others
(AMD with AVX2 alone) MKL is faster. `llm.ops.kernel_choice` has the library that the run uses for each kind of product.
Every other dtype and device uses torch's own product.
"""

import os

import torch
from jaxtyping import Float
from torch import Tensor

from llm.ops.kernel_choice import current

WORTHWHILE = 1 << 22
"""Number of multiplications below which the call costs more than the product saves."""

WORTHWHILE_READING = 1 << 18
"""The same bound for products without a gradient, which are called directly."""

COMPILED_PRODUCTS = 4096
"""Number of product shapes that oneDNN keeps compiled; 64 experts with uneven loads need more than the default 1024."""

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

"""Whether this torch can multiply by oneDNN."""


def keep_compiled_products() -> None:
    """Make oneDNN cache COMPILED_PRODUCTS shapes, unless the environment sets another number.

    Call it before the first product. oneDNN compiles a product per new shape and evicts the least recently used one.
    Memory is allocated only for shapes that occur.
    """
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(COMPILED_PRODUCTS))


def is_large_fp32(*tensors: Tensor, multiplications: int) -> bool:
    """Return whether a product of these tensors is worth a choice between MKL and oneDNN."""
    is_fp32 = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
    return HAS_ONEDNN and is_fp32 and multiplications >= WORTHWHILE


def uses_onednn(x: Tensor, weight: Tensor, multiplications: int) -> bool:
    """Return whether a linear layer runs one of its three products in oneDNN, forward or backward."""
    kernels = current()
    products = (kernels.product_forward, kernels.product_grad_input, kernels.product_grad_weight)
    return "onednn" in products and is_large_fp32(x, weight, multiplications=multiplications)


def is_read_only(x: Tensor, weight: Tensor, multiplications: int) -> bool:
    """Return whether a product without a gradient runs in oneDNN; that of a single token with a matrix already does."""
    if torch.is_grad_enabled() or multiplications < WORTHWHILE_READING or current().product_reading != "onednn":
        return False
    is_fp32 = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    return HAS_ONEDNN and is_fp32 and not torch.compiler.is_compiling()


def read_only_product(
    x: Float[Tensor, "*shape inner"], weight: Float[Tensor, "columns inner"]
) -> Float[Tensor, "*shape columns"]:
    """Return x weightᵀ, for tensors that satisfy `is_read_only`."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


def onednn_product(a: Float[Tensor, "rows inner"], b: Float[Tensor, "columns inner"]) -> Float[Tensor, "rows columns"]:
    """Return a bᵀ by oneDNN, for fp32 on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def product_nt(a: Float[Tensor, "rows inner"], b: Float[Tensor, "columns inner"]) -> Float[Tensor, "rows columns"]:
    """Return a bᵀ, as for the output of a linear layer."""
    if current().product_forward == "onednn" and is_large_fp32(a, b, multiplications=a.numel() * b.shape[0]):
        return onednn_product(a, b)
    return a @ b.t()


def product_nn(a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    """Return a b, as for the gradient of an input."""
    if current().product_grad_input == "onednn" and is_large_fp32(a, b, multiplications=a.numel() * b.shape[1]):
        return onednn_product(a, b.t())
    return a @ b


def product_tn(a: Float[Tensor, "inner rows"], b: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    """Return aᵀ b, as for the gradient of a weight."""
    if current().product_grad_weight == "onednn" and is_large_fp32(a, b, multiplications=a.numel() * b.shape[1]):
        return onednn_product(a.t(), b.t())
    return a.t() @ b
