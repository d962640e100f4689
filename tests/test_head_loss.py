"""The loss of any rule on vocabulary scores, in chunks, beside its definition."""

import pytest
import torch

from llm.ops.head_loss import head_loss, reference_head_loss
from llm.ops.loss import linear_cross_entropy


def rule(scores, ids, factors):
    return factors * (scores.logsumexp(-1) - scores.gather(1, ids[:, None])[:, 0]).square()


@pytest.mark.parametrize("chunk", [1, 5, 100, None])
def test_losses_and_gradients_equal_the_definition(chunk):
    hidden = torch.randn(3, 7, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    ids, factors = torch.randint(11, (3, 7)), torch.rand(3, 7, dtype=torch.float64)
    total, losses = head_loss(hidden, weight, rule, ids, factors, chunk_tokens=chunk)
    expected = reference_head_loss(hidden, weight, rule, ids, factors)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(total, expected.sum())
    found = torch.autograd.grad(3 * total, (hidden, weight))
    for own, their in zip(found, torch.autograd.grad(3 * expected.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(own, their)


def test_the_rule_of_cross_entropy_gives_the_cross_entropy():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(11, (6,))

    def cross_entropy(scores, ids):
        return torch.nn.functional.cross_entropy(scores, ids, reduction="none")

    total, _ = head_loss(hidden, weight, cross_entropy, labels)
    torch.testing.assert_close(total, linear_cross_entropy(hidden, weight, labels, reduction="sum"))


def test_under_autocast_products_are_in_bf16_and_the_rule_in_fp32():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    seen = []

    def watched(scores, ids):
        seen.append(scores.dtype)
        return scores.gather(1, ids[:, None])[:, 0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, losses = head_loss(hidden, weight, watched, torch.randint(11, (6,)))
    total.backward()
    assert seen == [torch.float32]
    assert losses.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_without_gradients_none_are_computed():
    with torch.no_grad():
        total, _ = head_loss(torch.randn(6, 8), torch.randn(11, 8), lambda scores: scores.sum(-1))
    assert not total.requires_grad
