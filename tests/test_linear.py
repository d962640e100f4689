import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm.ops import products
from llm.ops.linear_layer import Linear, plain_linear
from llm.ops.products import product_nn, product_nt, product_tn


@pytest.fixture(params=[0, 1 << 60], ids=["onednn", "torch"])
def _worthwhile(request, monkeypatch):
    monkeypatch.setattr(products, "WORTHWHILE", request.param)


@pytest.mark.usefixtures("_worthwhile")
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (63, 17, 5), (256, 64, 48)])
def test_products_equal_fp64_to_fp32_rounding(rows, inner, columns):
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    truth = a.double() @ b.double()
    # an fp32 dot product of n terms errs by at most n units in the last place of the sum of magnitudes
    bound = inner * torch.finfo(torch.float32).eps * (a.abs().double() @ b.abs().double()) + 1e-30
    for ours in (product_nn(a, b), product_nt(a, b.t().contiguous()), product_tn(a.t().contiguous(), b)):
        assert ((ours.double() - truth).abs() <= bound).all()


@pytest.mark.usefixtures("_worthwhile")
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (130,)])
def test_the_layer_and_its_gradients_equal_torchs(shape):
    layer = Linear(24, 40, bias=False)
    x = torch.randn(*shape, 24, requires_grad=True)
    slope = torch.randn(*shape, 40)
    outs = layer(x), plain_linear(x, layer.weight)
    grads = [torch.autograd.grad(out, (x, layer.weight), slope) for out in outs]
    for ours, wanted in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-5)  # fp32 sums of up to 189 terms, another order


def test_bias_autocast_and_other_dtypes_use_torchs_product(monkeypatch):
    monkeypatch.setattr(products, "WORTHWHILE", 0)
    x = torch.randn(4, 24)
    assert "linear" not in type(Linear(24, 40)(x).grad_fn).__name__
    assert Linear(24, 40, bias=False).double()(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(24, 40, bias=False)(x).dtype == torch.bfloat16


def test_a_strided_gradient_gives_the_same_result(monkeypatch):
    monkeypatch.setattr(products, "WORTHWHILE", 0)
    layer, x = Linear(24, 40, bias=False), torch.randn(3, 5, 24)
    layer(x).sum().backward()  # the gradient of a sum is expanded, of stride 0
    torch.testing.assert_close(layer.weight.grad, x.sum((0, 1)).expand(40, 24), rtol=1e-5, atol=1e-5)


COMPILED = """
import torch
from llm.ops import products
from llm.ops.linear_layer import Linear

products.WORTHWHILE = 0
layer, x = Linear(24, 40, bias=False), torch.randn(3, 63, 24, requires_grad=True)
compiled = torch.compile(lambda x: layer(x * 2).square().sum(), fullgraph=True, backend="aot_eager")
grads = torch.autograd.grad(compiled(x), (x, layer.weight))
for grad, wanted in zip(grads, torch.autograd.grad(layer(x * 2).square().sum(), (x, layer.weight))):
    torch.testing.assert_close(grad, wanted)
"""


def test_the_linear_layer_compiles_without_a_graph_break():
    # in a process of its own: the compiler cannot trace the shape checks that the tests put around every function
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=Path(__file__).parents[1])


OFTEN = """
import torch
from llm.ops.products import keep_compiled_products
keep_compiled_products()
weight = torch.ones(8, 8)
for turn in range(2):
    print("turn", flush=True)
    for rows in range(1, 1101):
        torch.ops.mkldnn._linear_pointwise(torch.ones(rows, 8), weight, None, "none", [], "")
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="products of oneDNN")
@pytest.mark.parametrize(("given", "compiled_anew"), [({}, 0), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}, 1100)])
def test_more_shapes_than_onednn_keeps_by_default_are_compiled_once(monkeypatch, given, compiled_anew):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    for name, value in {"ONEDNN_VERBOSE": "profile_create", **given}.items():
        monkeypatch.setenv(name, value)
    said = subprocess.run([sys.executable, "-c", OFTEN], capture_output=True, text=True, check=True).stdout
    _, first, second = said.split("turn\n")
    assert first.count("create:cache_miss") == 1100
    assert second.count("create:cache_miss") == compiled_anew
