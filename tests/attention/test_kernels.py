import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm.errors import ShapeError
from llm.model.attention.kernels import causal_attention, reference_attention
from llm.model.attention.kernels.blocked import blocked_attention
from llm.ops.kernel_choice import DEFAULT, using

ROOT = Path(__file__).parents[2]

SHAPES = [
    # batch, time, time_k, heads, kv_heads, head_dim, value_dim, window, mean document length
    (1, 1, 1, 2, 1, 8, 8, None, None),
    (2, 63, 63, 4, 2, 16, 16, None, 20),
    (2, 257, 257, 2, 2, 16, 16, None, None),
    (3, 300, 300, 4, 2, 16, 8, None, 60),
    (2, 300, 300, 4, 4, 16, 16, 70, 100),
    (1, 300, 300, 6, 1, 16, 16, 1, None),
    (2, 150, 300, 4, 2, 16, 16, None, 90),
    (2, 150, 301, 4, 2, 16, 16, 33, None),
    (2, 5, 300, 4, 2, 16, 16, 33, 40),
    (2, 1, 65, 4, 2, 16, 16, None, None),
    (2, 200, 200, 2, 1, 8, 8, None, 1),
    (1, 200, 200, 2, 1, 8, 8, None, 3),
]


def make(shape, dtype=torch.float64, seed=0):
    batch, time, time_k, heads, kv_heads, head_dim, value_dim, window, length = shape
    random = torch.Generator().manual_seed(seed)
    sizes = ((time, heads, head_dim), (time_k, kv_heads, head_dim), (time_k, kv_heads, value_dim))
    q, k, v = (torch.randn(batch, *s, generator=random, dtype=torch.float64).to(dtype) for s in sizes)
    ids = None if length is None else (torch.rand(batch, time_k, generator=random) < 1 / length).long().cumsum(1)
    options = {"document_ids": ids, "scale": head_dim**-0.5, "window": window}
    return tuple(x.requires_grad_() for x in (q, k, v)), options


@pytest.fixture(params=[512, 0], ids=["short rows share products", "each row has its own"])
def _short_row(request):
    with using(replace(DEFAULT, short_row=request.param)):
        yield


@pytest.mark.usefixtures("_short_row")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_lse_and_gradients_equal_the_reference(shape):
    inputs, options = make(shape)
    out, lse = causal_attention(*inputs, **options, return_lse=True)
    expected, expected_lse = reference_attention(*inputs, **options, return_lse=True)
    exact = {"rtol": 1e-9, "atol": 1e-12}  # fp64 on both sides: only the order of summation differs
    torch.testing.assert_close(out, expected, **exact)
    torch.testing.assert_close(lse, expected_lse, **exact)
    torch.testing.assert_close(causal_attention(*inputs, **options), expected, **exact)
    slopes = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), inputs, slopes)
    expected_grads = torch.autograd.grad((expected, expected_lse), inputs, slopes)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, **exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_the_output_alone_equal_the_reference(shape):
    inputs, options = make(shape)
    out, expected = causal_attention(*inputs, **options), reference_attention(*inputs, **options)
    slope = torch.randn_like(out)
    for grad, wanted in zip(
        torch.autograd.grad(out, inputs, slope), torch.autograd.grad(expected, inputs, slope), strict=True
    ):
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12)  # fp64: only the order of summation differs


@pytest.mark.parametrize("masked_up_to", [512, 0], ids=["masked short rows", "rows one by one"])
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("length", [None, 150, 20], ids=["no documents", "some rows of one", "rows of several"])
def test_attention_by_torchs_kernel_equals_the_reference(length, kv_heads, masked_up_to, monkeypatch):
    monkeypatch.setattr("llm.model.attention.kernels.torch_attention.MASKED_UP_TO", masked_up_to)
    inputs, options = make((6, 90, 90, 2, kv_heads, 16, 16, None, length), dtype=torch.float32, seed=3)
    with using(replace(DEFAULT, attention="sdpa")):
        out = causal_attention(*inputs, **options)
    if length == 150:
        ids = options["document_ids"]
        assert 0 < (ids[:, 0] == ids[:, -1]).sum() < len(ids)  # both kernels take part
    expected, slope = reference_attention(*inputs, **options), torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)  # fp32 sums in another order
    for grad, wanted in zip(
        torch.autograd.grad(out, inputs, slope), torch.autograd.grad(expected, inputs, slope), strict=True
    ):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[4], SHAPES[6]], ids=str)
def test_cutting_rows_and_heads_into_tiles_changes_nothing(shape, monkeypatch):
    inputs, options = make(shape)
    whole = causal_attention(*inputs, **options)
    grads = torch.autograd.grad(whole.sum(), inputs)
    monkeypatch.setattr("llm.model.attention.kernels.tiles.SCORE_ELEMENTS", 1)
    cut = causal_attention(*inputs, **options)
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-13)  # fp64; equal products of equal blocks
    for grad, wanted in zip(torch.autograd.grad(cut.sum(), inputs), grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-13)


def test_no_gradient_crosses_a_document_or_reaches_back_in_time():
    (q, k, v), options = make((1, 90, 90, 2, 1, 8, 8, None, 30))
    ids = options["document_ids"]
    out = causal_attention(q, k, v, **options)
    for i in (0, 31, 89):
        grad_k, grad_v = torch.autograd.grad(out[0, i].square().sum(), (k, v), retain_graph=True)
        sees = (ids[0] == ids[0, i]) & (torch.arange(90) <= i)
        assert (grad_v[0, sees].abs().amax((1, 2)) > 0).all()
        assert (grad_v[0, ~sees] == 0).all()
        assert (grad_k[0, ~sees] == 0).all()


@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_bf16_is_as_close_to_fp64_as_the_reference_run_in_bf16(shape):
    inputs, options = make(shape, torch.bfloat16)
    precise = tuple(x.detach().double().requires_grad_() for x in inputs)
    slope = torch.randn(*inputs[0].shape[:3], inputs[2].shape[-1])

    def run(function, tensors):
        out = function(*tensors, **options)
        return [out, *torch.autograd.grad(out, tensors, slope.to(out.dtype))]

    truth = run(reference_attention, precise)
    for ours, plain, true in zip(run(causal_attention, inputs), run(reference_attention, inputs), truth, strict=True):
        assert ours.dtype == torch.bfloat16
        # both round the scores to 8 bits; a quarter is left for which way single roundings fall
        assert (ours - true).norm() <= 1.25 * (plain - true).norm()


def test_autocast_casts_queries_keys_and_values():
    (q, k, v), options = make(SHAPES[1], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = causal_attention(q, k, v, **options, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(grad.dtype == torch.float32 for grad in grads)
    expected = causal_attention(*(x.bfloat16() for x in (q, k, v)), **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


COMPILED = """
import torch
from llm.model.attention.kernels import causal_attention

inputs = [torch.randn(3, 130, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
ids = (torch.rand(3, 130) < 0.02).long().cumsum(1)

def run(q, k, v):
    out, lse = causal_attention(q * 2, k, v, document_ids=ids, scale=0.25, window=40, return_lse=True)
    return out.sum() + lse.sum()

compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
for grad, wanted in zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(run(*inputs), inputs)):
    torch.testing.assert_close(grad, wanted)
"""


def test_it_compiles_without_a_break():
    # in a process of its own: the compiler cannot trace the shape checks that the tests put around every function
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=ROOT)


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[4]], ids=str)
def test_the_operator_keeps_its_promises_to_the_compiler(shape):
    (q, k, v), options = make(shape)
    torch.library.opcheck(blocked_attention.operator, (q, k, v, *options.values(), None, True))


def test_the_step_never_holds_time_by_time(monkeypatch):
    monkeypatch.setattr("llm.model.attention.kernels.tiles.SCORE_ELEMENTS", 1)
    largest = []
    baddbmm = torch.Tensor.baddbmm_
    monkeypatch.setattr(torch.Tensor, "baddbmm_", lambda x, *a, **o: largest.append(x.numel()) or baddbmm(x, *a, **o))
    (q, k, v), options = make((1, 1024, 1024, 2, 2, 8, 8, None, None), torch.float32)
    causal_attention(q, k, v, **options).sum().backward()
    assert max(largest) == 128 * 1024  # one block of queries of one head


@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        (((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8)), None),
        (((1, 5, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)), None),
        (((1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)), 0),
    ],
)
def test_shapes_that_do_not_match_are_refused(sizes, window):
    with pytest.raises(ShapeError, match="attention"):
        causal_attention(*(torch.zeros(s) for s in sizes), scale=1.0, window=window)
