"""Hyperball: matrices turn and keep their norms, on whole tensors and on shards."""

import pytest
import torch
from catalogue import build_piece
from torch import nn

from llm.errors import ConfigError
from llm.optim.hyperball import ball_factors


def build(groups, **settings):
    return build_piece("optimizer", "muon", params=groups, hyperball=True, matmul_dtype="float32", **settings)


def norms(module):
    weights = [p.detach() for p in module.parameters() if p.ndim >= 2]
    return torch.cat([torch.linalg.matrix_norm(weight.double()).reshape(-1) for weight in weights])


def test_a_step_equals_the_definition_in_double_precision():
    torch.manual_seed(0)
    weight, direction = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    moved = weight - 0.03 * weight.norm() / direction.norm() * direction
    expected = moved * weight.norm() / moved.norm()
    products = torch.stack([(x * y).sum() for x, y in ((weight, weight), (weight, direction), (direction, direction))])
    step, factor = ball_factors(products, 0.03)
    got = factor * (weight - step * direction)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    assert got.norm().item() == pytest.approx(weight.norm().item(), rel=1e-14)


def test_the_norm_of_every_matrix_and_expert_is_constant_over_a_hundred_steps(zoo, groups_of, set_gradients):
    matrices = [zoo.tall.weight, zoo.wide.weight, zoo.square.weight, zoo.experts.weight]
    before = [torch.linalg.matrix_norm(weight.detach().double()) for weight in matrices]
    start = zoo.square.weight.detach().clone()
    optimizer = build(groups_of(zoo, lr=0.03))
    for step in range(100):
        set_gradients(zoo, step)
        optimizer.step()
    for weight, norm in zip(matrices, before, strict=True):
        torch.testing.assert_close(torch.linalg.matrix_norm(weight.detach().double()), norm, rtol=1e-5, atol=0)
    assert (zoo.square.weight - start).norm() > 0.3 * start.norm()  # it turned, and did not stand still


def test_a_step_turns_a_matrix_by_about_lr_whatever_the_size_of_gradients_and_weights(groups_of):
    turned = []
    for gradient_size, weight_size in ((1.0, 1.0), (10.0, 1.0), (1.0, 7.0)):
        torch.manual_seed(0)
        linear = nn.Linear(32, 32, bias=False)
        with torch.no_grad():
            linear.weight.mul_(weight_size)
        optimizer = build(groups_of(linear, lr=0.03))
        before = linear.weight.detach().clone()
        linear.weight.grad = gradient_size * torch.randn(32, 32)
        optimizer.step()
        cosine = nn.functional.cosine_similarity(before.flatten(), linear.weight.detach().flatten(), dim=0)
        turned.append((before / weight_size, linear.weight.detach() / weight_size))
        assert 0.9 * 0.03 < torch.acos(cosine.double()).item() < 1.1 * 0.03
    for _, after in turned[1:]:
        torch.testing.assert_close(after, turned[0][1], rtol=1e-5, atol=1e-6)


def test_an_expert_without_a_token_does_not_move_at_all(zoo, groups_of, set_gradients):
    optimizer = build(groups_of(zoo, lr=0.03))
    set_gradients(zoo, 0)
    optimizer.step()
    before = zoo.experts.weight.detach().clone()
    set_gradients(zoo, 1)
    zoo.experts.weight.grad[1] = 0
    optimizer.step()
    assert (zoo.experts.weight != before).flatten(1).any(1).tolist() == [True, False, True]


def test_other_kinds_take_the_rule_aux_and_may_decay(zoo, groups_of):
    groups = groups_of(zoo, lr=0.03, weight_decay=0.1, decayed_kinds=("embedding", "head"))
    optimizer = build(groups, weight_decay=0.1)
    rates = {group["kind"]: (optimizer.rule_of(group), group["lr"]) for group in optimizer.param_groups}
    assert rates["matrix"] == ("muon on a sphere", 0.03)
    assert rates["embedding"] == ("adamw", pytest.approx(0.006))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": 0.1}, r"optimizer\.weight_decay=0\.1: optimizer\.hyperball=true keeps .*weight_decay=0"),
        ({"cautious_decay": True}, r"optimizer\.cautious_decay=true: optimizer\.hyperball=true"),
    ],
)
def test_decay_of_matrices_is_refused(zoo, groups_of, options, message):
    groups = groups_of(zoo, lr=0.03, weight_decay=options.get("weight_decay", 0.0))
    with pytest.raises(ConfigError, match=message):
        build(groups, **options)


def test_a_matrix_that_starts_at_zero_is_refused_by_name(zoo, groups_of):
    with torch.no_grad():
        zoo.experts.weight[2].zero_()
    with pytest.raises(ConfigError, match=r"experts\.weight has a matrix that starts at zero"):
        build(groups_of(zoo, lr=0.03))
