import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm.contracts import IGNORED_LABEL
from llm.errors import ConfigError, ShapeError
from llm.ops.loss import linear_cross_entropy, reference_linear_cross_entropy

SHAPES = [((1, 1), 8, 5), ((3, 63), 24, 101), ((2, 64), 32, 257)]


def make(shape, d_model, vocab, dtype=torch.float32, ignored=True):
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, d_model, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(vocab, d_model, generator=random).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, shape, generator=random)
    if ignored:
        labels[:, ::3] = IGNORED_LABEL
        labels[0, 0] = 0
    return hidden, weight, labels


def gradients(loss, *tensors):
    return torch.autograd.grad(3 * loss, tensors)  # an incoming gradient other than 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [1, 17, None])
@pytest.mark.parametrize(("shape", "d_model", "vocab"), SHAPES)
def test_loss_and_gradients_equal_the_plain_form(shape, d_model, vocab, chunk, reduction):
    hidden, weight, labels = make(shape, d_model, vocab)
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, chunk_tokens=chunk)
    expected = reference_linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-6)  # fp32 rounding, sums in another order
    pairs = zip(gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True)
    for grad, wanted in pairs:
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=2e-6 * wanted.abs().max().item())


def test_each_tokens_loss_equals_the_plain_form_and_is_zero_where_ignored():
    hidden, weight, labels = make((3, 63), 24, 101)
    with torch.no_grad():
        losses = linear_cross_entropy(hidden, weight, labels, reduction="none", chunk_tokens=50)
        expected = reference_linear_cross_entropy(hidden, weight, labels, reduction="none")
    assert losses.shape == labels.shape
    assert (losses[labels == IGNORED_LABEL] == 0).all()
    torch.testing.assert_close(losses, expected, rtol=2e-6, atol=4e-6)  # fp32 rounding of scores of size 20


def test_fp64_equals_the_plain_form_to_fp64_rounding():
    hidden, weight, labels = make((3, 63), 24, 101, torch.float64)
    loss, expected = (f(hidden, weight, labels) for f in (linear_cross_entropy, reference_linear_cross_entropy))
    assert abs(loss.item() / expected.item() - 1) < 1e-14
    for grad, wanted in zip(gradients(loss, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-15)


def test_a_very_unlikely_label_has_a_finite_loss():
    hidden, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[500.0], [0.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    assert loss.item() == 500.0
    assert torch.autograd.grad(loss, hidden)[0].item() == 500.0


def test_a_zero_projection_gives_the_entropy_of_guessing():
    loss = linear_cross_entropy(torch.randn(4, 9, 8), torch.zeros(50, 8), torch.zeros(4, 9, dtype=torch.long))
    assert loss.item() == pytest.approx(math.log(50), rel=1e-6)


def test_without_a_valid_label_loss_and_gradients_are_zero():
    hidden, weight, labels = make((2, 64), 32, 257)
    labels.fill_(IGNORED_LABEL)
    loss = linear_cross_entropy(hidden, weight, labels)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in gradients(loss, hidden, weight))


def test_autocast_is_as_close_to_fp64_as_the_plain_form_and_the_weight_gradient_is_closer():
    hidden, weight, labels = make((2, 64), 32, 257)
    errors = {}
    precise = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = reference_linear_cross_entropy(*precise, labels)
    truths = [truth.detach(), *torch.autograd.grad(truth, precise)]
    for function in (linear_cross_entropy, reference_linear_cross_entropy):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(hidden, weight, labels)
        assert loss.dtype == torch.float32
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert all(grad.dtype == torch.float32 for grad in grads)
        errors[function] = [(a - b).norm().item() for a, b in zip([loss.detach(), *grads], truths, strict=True)]
    ours, plain = errors[linear_cross_entropy], errors[reference_linear_cross_entropy]
    assert ours[0] <= plain[0] + 1e-6  # the same scores, summed in another order
    assert ours[1] <= 1.05 * plain[1]
    assert ours[2] <= plain[2]  # sums of chunks are kept in fp32, where autocast rounds the product


def test_bf16_parameters_get_bf16_gradients():
    hidden, weight, labels = make((2, 64), 32, 257, torch.bfloat16)
    grads = gradients(linear_cross_entropy(hidden, weight, labels), hidden, weight)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.bfloat16]


def test_gradients_are_computed_only_for_inputs_that_require_them():
    hidden, weight, labels = make((2, 64), 32, 257)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference_linear_cross_entropy(hidden, weight, labels).detach())


COMPILED = """
import torch
from llm.ops.loss import linear_cross_entropy

hidden, weight = torch.randn(2, 64, 32, requires_grad=True), torch.randn(257, 32, requires_grad=True)
labels = torch.randint(0, 257, (2, 64))

def run(hidden, weight):
    return linear_cross_entropy(hidden * 2, weight, labels, chunk_tokens=50)

compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
loss, expected = compiled(hidden, weight), run(hidden, weight)
torch.testing.assert_close(loss, expected)
grads = [torch.autograd.grad(3 * x, (hidden, weight)) for x in (loss, expected)]
for grad, wanted in zip(*grads):
    torch.testing.assert_close(grad, wanted)
"""


def test_the_loss_compiles_without_a_graph_break():
    # in a process of its own: the compiler cannot trace the shape checks that the tests put around every function
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=Path(__file__).parents[1])


def test_the_scores_of_all_tokens_never_exist_at_once():
    hidden, weight, labels = make((2, 64), 32, 257)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(largest, *(x.numel() for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)))
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=8).backward()
    assert largest == weight.numel() < labels.numel() * 257


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"reduction": "none"}, ConfigError, "no gradient"),
        ({"chunk_tokens": 0}, ConfigError, "at least 1"),
        ({"labels": torch.zeros(2, 63, dtype=torch.long)}, (ShapeError, TypeCheckError), "labels"),
    ],
)
def test_invalid_arguments_are_refused(options, error, text):
    hidden, weight, labels = make((2, 64), 32, 257)
    arguments = {"labels": labels, **options}
    with pytest.raises(error, match=text):
        linear_cross_entropy(hidden, weight, **arguments)


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 2**23 // 4096), ("cuda", 2**28 // 4096)])
def test_a_gpu_takes_larger_chunks_of_scores(device, tokens, monkeypatch):
    chunks = []
    monkeypatch.setattr(
        "llm.ops.loss._cross_entropy", lambda h, w, ids, weights, chunk, *_: chunks.append(chunk) or (h.sum(),) * 4
    )
    with FakeTensorMode():
        hidden, weight = torch.empty(1, 8, 4, device=device), torch.empty(4096, 4, device=device)
        linear_cross_entropy(hidden, weight, torch.zeros(1, 8, dtype=torch.long, device=device))
    assert chunks == [tokens]
