import pytest
import torch

from llm.ops import functional
from llm.ops.functional import FusedRMSNorm, FusedRotation, FusedSwiGLU, plain_rms_norm, plain_rotate, plain_swiglu

CHUNKS = [64, 1 << 18]  # pieces of a few rows, and one piece


@pytest.fixture(params=CHUNKS, autouse=True)
def _chunk(request, monkeypatch):
    monkeypatch.setattr(functional, "CHUNK", request.param)


def same(ours, plain, inputs, tolerance):
    torch.testing.assert_close(ours, plain, **tolerance)
    slope = torch.randn_like(plain)
    grads, wanted = (torch.autograd.grad(out, inputs, slope) for out in (ours, plain))
    for grad, expected in zip(grads, wanted, strict=True):
        assert grad.dtype == expected.dtype
        torch.testing.assert_close(grad, expected, **tolerance)


FP64 = {"rtol": 1e-10, "atol": 1e-12}  # only the order of summation differs


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 63, 24), (5, 33)])
def test_rms_norm_equals_its_definition(shape):
    x = (torch.randn(shape, dtype=torch.float64) + 0.5).requires_grad_()
    gain = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    ours = FusedRMSNorm.apply(x, gain, 1e-5, torch.float64)
    same(ours, plain_rms_norm(x, gain, 1e-5, torch.float64), (x, gain), FP64)


def test_rms_norm_of_fp32_writes_bf16_and_returns_fp32_gradients():
    x, gain = torch.randn(3, 63, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    ours = FusedRMSNorm.apply(x, gain, 1e-5, torch.bfloat16)
    plain = plain_rms_norm(x, gain, 1e-5, torch.bfloat16)
    # one bf16 rounding of values that agree to fp32 rounding: at most one step of 2^-8 where it falls on a boundary
    same(ours, plain, (x, gain), {"rtol": 2**-8, "atol": 1e-4})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotation_equals_its_definition(dtype, rows):
    x = torch.randn(2, 63, 3, 10, dtype=torch.float64).to(dtype).requires_grad_()
    angles = torch.rand(rows, 63, 5, dtype=torch.promote_types(dtype, torch.float32)) * 6
    # the same multiplications and additions, which fused multiply-add may round once less
    tolerance = {torch.float64: FP64, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}.get(
        dtype, {"rtol": 2**-7, "atol": 2**-8}
    )
    ours, plain = (f(x, angles.cos(), angles.sin()) for f in (FusedRotation.apply, plain_rotate))
    same(ours, plain, (x,), tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_swiglu_equals_its_definition(dtype):
    gate, up = (torch.randn(3, 63, 24, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2))
    # bf16: both round silu and the products at the same places
    tolerance = FP64 if dtype == torch.float64 else {"rtol": 2**-7, "atol": 2**-8}
    same(FusedSwiGLU.apply(gate, up), plain_swiglu(gate, up), (gate, up), tolerance)


def test_every_function_uses_the_fused_form_for_large_tensors_and_the_plain_form_for_small_ones():
    large, small = (torch.randn(2, n, 2, 16, requires_grad=True) for n in (20000, 3))
    gain = torch.ones(16)
    for x, is_fused in ((large, True), (small, False)):
        cos, sin = torch.rand(2, x.shape[1], 8), torch.rand(2, x.shape[1], 8)
        outs = [functional.rms_norm(x, gain, 1e-5), functional.rotate(x, cos, sin), functional.swiglu(x, x)]
        assert [type(out.grad_fn).__name__.startswith("Fused") for out in outs] == [is_fused] * 3


def test_the_norm_returns_the_dtype_of_autocast_at_any_size():
    for time in (3, 9000):
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.rms_norm(torch.randn(1, time, 8), torch.ones(8), 1e-5).dtype == torch.bfloat16


def test_function_transforms_use_the_plain_form():
    x = torch.randn(2, 70000)
    tangent = torch.func.vmap(torch.func.grad(lambda row: functional.swiglu(row, row).sum()))(x)
    wanted = torch.autograd.grad(plain_swiglu(y := x.clone().requires_grad_(), y).sum(), y)[0]
    torch.testing.assert_close(tangent, wanted)
