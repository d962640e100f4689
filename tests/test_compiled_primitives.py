"""Training compiles no further oneDNN primitive after its first updates.

oneDNN keeps up to 4096 compiled primitives. A scalar or a shape that depends on data compiles one per call, which costs
time and memory until the cache is full.
"""

import ctypes

import pytest
import torch
from attention_pairs import GEOMETRY, build_pair
from catalogue import build_piece, options
from torch import nn

import llm
from llm.ops import products
from llm.ops.precision import cpu_multiplies_bf16

pytestmark = pytest.mark.skipif(not cpu_multiplies_bf16(), reason="this CPU has no bf16 products of its own")

WARM_UP, UPDATES = 4, 12
MUON = {
    "plain": {},
    "polar_express": {"iteration": "polar_express"},
    "rows, heads": {"row_beta": 0.95, "by_head": True},
}
POSITIONS = {"vq": "rerope"}


@pytest.fixture
def compiled(capfd):
    """Return a function that repeats an update and returns the number of primitives compiled by each repetition."""

    def run(update):
        counts = []
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
            for _ in range(UPDATES):
                update()
                ctypes.CDLL(None).fflush(None)
                text = capfd.readouterr().out
                counts.append(text.count("create:cache_miss"))
                assert text.count("primitive,exec"), "no product of this update runs in oneDNN"
        return counts

    return run


def test_a_scalar_that_changes_is_seen(compiled):
    x = torch.randn(48, 48, dtype=torch.bfloat16)
    assert all(compiled(lambda: torch.addmm(x, x, x, beta=float(torch.rand(())))))


@pytest.mark.parametrize("options_of_muon", MUON.values(), ids=MUON)
def test_muon_compiles_no_primitive_after_its_first_updates(compiled, options_of_muon):
    """The other optimizers have no products."""
    shapes = [(64, 64), (48, 96), (160, 64), (4, 64, 48)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    group = {"params": params, "names": [str(shape) for shape in shapes], "kind": "matrix", "heads": [2, 1, 2, 1]}
    settings = {"lr": 0.01, "weight_decay": 0.1, "aux_lr_scale": 1.0, "matmul_dtype": "bfloat16", **options_of_muon}
    optimizer = build_piece("optimizer", "muon", params=[group | {"lr": 0.01, "weight_decay": 0.1}], **settings)

    def update():
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape) * torch.rand(())
        optimizer.step()

    assert not any(compiled(update)[WARM_UP:])


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32], ids=["bf16-mixed", "32-true"])
@pytest.mark.parametrize("name", [*options("model/attention"), *options("model/ffn")])
def test_no_primitive_is_compiled_after_the_first_updates(compiled, monkeypatch, name, precision):
    monkeypatch.setattr(products, "WORTHWHILE", 0)  # small fp32 products run in oneDNN too
    piece = (
        build_pair(name, POSITIONS.get(name, "rope"))
        if name in options("model/attention")
        else llm.build(f"model/ffn={name}", d_model=GEOMETRY.d_model, d_ff=64)
    )
    context = {"positions": torch.arange(64).expand(4, -1), "document_ids": None}
    tokens = torch.randn(4, 64, GEOMETRY.d_model)

    def update():
        x = (tokens * (1 + 1e-3 * torch.rand(()))).requires_grad_()  # so close that experts keep their tokens
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            out = piece(x, **context) if name in options("model/attention") else piece(x)
        out.hidden.float().square().sum().backward()

    assert not any(compiled(update)[WARM_UP:])
