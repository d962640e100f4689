"""An operator that is a plain call in eager mode and one node of a traced graph."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llm.ops.linear_layer import onednn_linear, onednn_linear_grad
from llm.ops.traceable import traceable_op


@pytest.fixture
def calls(monkeypatch):
    """The names of the operators that were called."""
    found = []
    for op in (onednn_linear, onednn_linear_grad):
        real = op.operator
        monkeypatch.setattr(op, "operator", lambda *a, real=real: found.append(real._name) or real(*a))
    return found


def test_eager_calls_pass_no_operator_and_have_its_gradients(calls):
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    y = onednn_linear(x, weight)
    grads = torch.autograd.grad(y.square().sum(), (x, weight))
    assert not calls
    wanted = torch.ops.crucible.linear(x, weight)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0)  # the same function
    for grad, other in zip(grads, torch.autograd.grad(wanted.square().sum(), (x, weight)), strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=0)


def test_meta_and_fake_tensors_and_modes_use_the_operator(calls):
    assert onednn_linear(torch.empty(5, 3, device="meta"), torch.empty(4, 3, device="meta")).shape == (5, 4)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(5, 3))
        assert onednn_linear(fake, torch.randn(4, 3)).shape == (5, 4)
    assert len(calls) == 2
    onednn_linear(fake, fake[:4])  # outside its mode
    assert len(calls) == 3


def test_a_function_without_a_gradient_records_none():
    double = traceable_op("crucible_tests::double", schema="(Tensor x) -> Tensor")(lambda x: x * 2)
    assert not double(torch.ones(2, requires_grad=True)).requires_grad
