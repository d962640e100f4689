import pytest
import torch

from llm.model.norm import LayerNorm, RMSNorm


@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 63, 64)])
def test_rms_norm_equals_its_equation(shape):
    norm = RMSNorm(dim=shape[-1], eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_layer_norm_equals_its_equation():
    norm = LayerNorm(dim=64, eps=1e-5, bias=True)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 64)
    centred = x - x.mean(-1, keepdim=True)
    expected = norm.weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + norm.bias
    torch.testing.assert_close(norm(x), expected)
