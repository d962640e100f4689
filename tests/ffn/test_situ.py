"""SiTU-GLU: its derivative, its bounds, its limit SwiGLU, and layers and experts that use it."""

import pytest
import torch

from llm.errors import ConfigError
from llm.model.ffn.swiglu import SwiGLU
from llm.ops import functional
from llm.ops.functional import plain_swiglu
from llm.ops.situ import Caps, FusedSituGLU, plain_situ_glu, situ_glu, situ_slopes

CAPS = Caps(4.0, 25.0)
FP64 = {"rtol": 1e-10, "atol": 1e-12}  # only the order of operations differs


def pair(*shape, dtype=torch.float64, scale=3.0):
    return tuple((scale * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_() for _ in range(2))


@pytest.mark.parametrize("chunk", [64, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_fused_form_equals_the_definition_with_gradients(chunk, dtype, monkeypatch):
    monkeypatch.setattr(functional, "CHUNK", chunk)
    gate, up = pair(3, 63, 24, dtype=dtype)
    # bf16: both compute in fp32 and round once
    tolerance = FP64 if dtype == torch.float64 else {"rtol": 2**-7, "atol": 2**-8}
    fused, plain = FusedSituGLU.apply(gate, up, CAPS), plain_situ_glu(gate, up, CAPS)
    torch.testing.assert_close(fused, plain, **tolerance)
    slope = torch.randn_like(plain)
    grads = (torch.autograd.grad(out, (gate, up), slope) for out in (fused, plain))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


def test_the_derivative_is_right_and_large_tensors_are_fused():
    assert torch.autograd.gradcheck(lambda g, u: FusedSituGLU.apply(g, u, CAPS), pair(4, 6))
    gate, up = pair(5, 7)
    units, by_gate, by_up = situ_slopes(gate, up, CAPS)
    expected = plain_situ_glu(gate, up, CAPS)
    torch.testing.assert_close(units, expected, **FP64)
    wanted = torch.autograd.grad(expected.sum(), (gate, up))
    torch.testing.assert_close((by_gate, by_up), wanted, **FP64)
    assert type(situ_glu(*pair(functional.WORTHWHILE // 64, 64), CAPS).grad_fn).__name__.startswith("FusedSitu")


def test_wide_caps_give_swiglu_and_units_are_bounded_by_the_product_of_the_caps():
    gate, up = pair(2000, scale=1.0)
    torch.testing.assert_close(plain_situ_glu(gate, up, Caps(1e4, 1e4)), plain_swiglu(gate, up), rtol=1e-6, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float32):
        huge = torch.tensor([1e4, -1e4, 1.0, 3e4]).to(dtype)
        units = situ_glu(huge, huge.flip(0), CAPS)
        assert units.isfinite().all()
        assert units.abs().max() <= 100
    # a new model starts as with SwiGLU: RMS at normal inputs
    gate, up = torch.randn(2, 200_000, dtype=torch.float64)
    rms = [float(f.square().mean().sqrt()) for f in (plain_situ_glu(gate, up, CAPS), plain_swiglu(gate, up))]
    assert rms[0] / rms[1] == pytest.approx(0.938, abs=0.01)


def test_a_layer_logs_its_largest_hidden_unit_in_training_alone():
    layer = SwiGLU(d_model=8, d_ff=16, activation="situ", gate_cap=1.0, up_cap=2.0)
    x = 100 * torch.randn(2, 5, 8)
    units = plain_situ_glu(layer.gate_proj(x), layer.up_proj(x), Caps(1.0, 2.0))
    out = layer.train()(x)
    assert out.metrics["hidden_max"] == units.abs().max()
    torch.testing.assert_close(out.hidden, layer.down_proj(units))
    assert layer.eval()(x).metrics == {}
    assert SwiGLU(d_model=8, d_ff=16).train()(x).metrics == {}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"gate_cap": 4.0}, r"gate_cap=4\.0: bounds model\.ffn\.activation=situ alone"),
        ({"activation": "situ", "up_cap": 0.0}, r"up_cap=0\.0: must be above 0"),
    ],
)
def test_a_setting_without_meaning_is_refused(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        SwiGLU(d_model=8, d_ff=16, **settings)
