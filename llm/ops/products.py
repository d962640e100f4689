"""Matrix products in fp32 on a CPU by oneDNN, where torch would call MKL.

On processors for which MKL is not tuned (AMD with AVX-512), oneDNN multiplies fp32 about twice as fast at the same
precision. Every other dtype and device uses torch's own product.
"""

import os

import torch
from jaxtyping import Float
from torch import Tensor

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


def uses_onednn(*tensors: Tensor, multiplications: int) -> bool:
    """Return whether a product of these tensors runs in oneDNN."""
    is_fp32 = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
    return HAS_ONEDNN and is_fp32 and multiplications >= WORTHWHILE


def is_read_only(x: Tensor, weight: Tensor, multiplications: int) -> bool:
    """Return whether a product without a gradient runs in oneDNN; that of a single token with a matrix already does."""
    if torch.is_grad_enabled() or multiplications < WORTHWHILE_READING or not HAS_ONEDNN:
        return False
    is_fp32 = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    return is_fp32 and not torch.compiler.is_compiling()


def read_only_product(
    x: Float[Tensor, "*shape inner"], weight: Float[Tensor, "columns inner"]
) -> Float[Tensor, "*shape columns"]:
    """Return x weightᵀ, for tensors that satisfy `is_read_only`."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


def onednn_product(a: Float[Tensor, "rows inner"], b: Float[Tensor, "columns inner"]) -> Float[Tensor, "rows columns"]:
    """Return a bᵀ by oneDNN, for fp32 on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def product_nt(a: Float[Tensor, "rows inner"], b: Float[Tensor, "columns inner"]) -> Float[Tensor, "rows columns"]:
    """Return a bᵀ."""
    if uses_onednn(a, b, multiplications=a.numel() * b.shape[0]):
        return onednn_product(a, b)
    return a @ b.t()


def product_nn(a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    """Return a b."""
    if uses_onednn(a, b, multiplications=a.numel() * b.shape[1]):
        return onednn_product(a, b.t())
    return a @ b


def product_tn(a: Float[Tensor, "inner rows"], b: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    """Return aᵀ b, as for the gradient of a weight."""
    return product_nt(a.t(), b.t())
