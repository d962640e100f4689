import copy

import pytest
import torch
from catalogue import CONF
from omegaconf import OmegaConf
from torch import nn

from llm.errors import ConfigError
from llm.optim.lion import Lion
from llm.optim.tiger import Tiger

BETAS = (0.95, 0.98)


def lion(groups, *, lr=0.01, weight_decay=0.1, betas=BETAS, skip_idle_rows=True):
    return Lion(groups, lr=lr, weight_decay=weight_decay, betas=betas, skip_idle_rows=skip_idle_rows)


def test_the_first_two_steps_equal_the_hand_computed_ones(groups_of):
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[1.0, -2.0]])
    optimizer = lion(groups_of(linear, lr=0.1, weight_decay=0.5), betas=(0.9, 0.5))
    linear.weight.grad = torch.tensor([[3.0, -4.0]])
    optimizer.step()
    # u = sign(0.1 g) = (1, -1); θ = θ (1 - 0.05) - 0.1 u; m = 0.5 g = (1.5, -2)
    torch.testing.assert_close(linear.weight.data, torch.tensor([[0.85, -1.8]]))
    linear.weight.grad = torch.tensor([[-20.0, 4.0]])
    optimizer.step()
    # u = sign(0.9 m + 0.1 g) = sign(-0.65, -1.4) = (-1, -1)
    torch.testing.assert_close(linear.weight.data, torch.tensor([[0.9075, -1.61]]))
    torch.testing.assert_close(optimizer.state[linear.weight]["momentum"], torch.tensor([[-9.25, 1.0]]))


def test_every_weight_moves_by_exactly_lr_or_not_at_all(zoo, groups_of, set_gradients):
    optimizer = lion(groups_of(zoo, lr=0.25))
    set_gradients(zoo, 0)
    zoo.square.weight.grad[0] = 0.0
    before = copy.deepcopy(zoo.state_dict())
    optimizer.step()
    moved = (zoo.square.weight - before["square.weight"]).abs()
    # one rounding of θ − lr at |θ| < 1
    torch.testing.assert_close(moved[1:], torch.full_like(moved[1:], 0.25), atol=1e-6, rtol=0)
    assert not moved[0].any()


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_the_trajectory_does_not_depend_on_the_scale_of_the_gradients(zoo, groups_of, set_gradients, scale):
    other = copy.deepcopy(zoo)
    optimizers = [lion(groups_of(m, lr=0.01, weight_decay=0.1)) for m in (zoo, other)]
    for step in range(20):
        for module, optimizer, factor in zip((zoo, other), optimizers, (1.0, scale), strict=True):
            set_gradients(module, step)
            for parameter in module.parameters():
                parameter.grad.mul_(factor)
            optimizer.step()
    for left, right in zip(zoo.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)  # powers of two scale without rounding


def test_with_equal_betas_it_is_the_core_of_tiger_bit_for_bit(groups_of, set_gradients):
    """Tiger's rate for vectors is half of lr, so Lion gets that."""
    one, two = nn.LayerNorm(37), nn.LayerNorm(37)
    left = lion(groups_of(one, lr=0.01, weight_decay=0.1, decayed_kinds=["vector"]), betas=(0.965, 0.965))
    right = Tiger(
        groups_of(two, lr=0.02, weight_decay=0.1, decayed_kinds=["vector"]),
        lr=0.02,
        weight_decay=0.1,
        beta=0.965,
        min_rms=0.0,
        min_rms_ratio=0.0,
        shrink_ratio=None,
        accumulate="buffer",
        skip_idle_rows=True,
    )
    for step in range(200):
        for module, optimizer in ((one, left), (two, right)):
            set_gradients(module, step)
            optimizer.step()
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)


def test_it_equals_lion_pytorch_over_fifty_steps(zoo, groups_of, set_gradients):
    published = pytest.importorskip("lion_pytorch").Lion
    zoo.double()
    other = copy.deepcopy(zoo)
    ours = lion(groups_of(zoo, lr=0.01, weight_decay=0.1, decayed_kinds=["matrix", "embedding", "head", "vector"]))
    theirs = published(other.parameters(), lr=0.01, betas=BETAS, weight_decay=0.1)
    for step in range(50):
        for module, optimizer in ((zoo, ours), (other, theirs)):
            set_gradients(module, step)
            optimizer.step()
    for left, right in zip(zoo.parameters(), other.parameters(), strict=True):
        # the momentum is fp32 here and fp64 there; no sign of these seeded sums lies within its rounding of 0
        torch.testing.assert_close(left, right, atol=1e-12, rtol=0)


def test_rows_and_experts_without_a_gradient_are_not_moved_by_a_stale_momentum(zoo, groups_of, set_gradients):
    optimizer = lion(groups_of(zoo, lr=0.01, weight_decay=0.1, decayed_kinds=["matrix", "embedding"]))
    set_gradients(zoo, 0)
    optimizer.step()
    before = copy.deepcopy(zoo.state_dict())
    set_gradients(zoo, 1)
    zoo.embedding.weight.grad[3:7] = 0.0
    zoo.experts.weight.grad[1] = 0.0
    optimizer.step()
    after = zoo.state_dict()
    moved = (after["embedding.weight"] != before["embedding.weight"]).all(1)
    assert moved.tolist() == [not 3 <= row < 7 for row in range(13)]
    moved = (after["experts.weight"] != before["experts.weight"]).flatten(1).all(1)
    assert moved.tolist() == [True, False, True]


def test_without_skip_idle_rows_idle_rows_move_as_published(zoo, groups_of, set_gradients):
    optimizer = lion(groups_of(zoo), skip_idle_rows=False)
    set_gradients(zoo, 0)
    optimizer.step()
    before = zoo.embedding.weight.clone()
    zoo.embedding.weight.grad = torch.zeros_like(zoo.embedding.weight)
    optimizer.step()
    assert (zoo.embedding.weight != before).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "optimizer.lr=-1.0"),
        ({"lr": float("nan")}, "optimizer.lr=nan"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, "optimizer.betas=1.0"),
        ({"betas": (-0.1, 0.9)}, "optimizer.betas=-0.1"),
        ({"betas": (0.9,)}, "needs two numbers"),
    ],
)
def test_settings_out_of_range_are_errors(zoo, groups_of, options, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        lion(groups_of(zoo), **options)


def test_chunks_change_nothing(groups_of, set_gradients, monkeypatch):
    """The same update, cut into pieces of 64 elements or whole."""
    modules = [nn.Linear(33, 47), nn.Linear(33, 47)]
    modules[1].load_state_dict(modules[0].state_dict())
    for module, chunk in zip(modules, (64, 10**6), strict=True):
        monkeypatch.setattr("llm.optim.grouped_optimizer.CHUNK", chunk)
        optimizer = lion(groups_of(module, weight_decay=0.1))
        for step in range(3):
            set_gradients(module, step)
            optimizer.step()
    assert torch.equal(modules[0].weight, modules[1].weight)
    assert torch.equal(modules[0].bias, modules[1].bias)


def test_defaults_for_rows_without_a_gradient_are_those_that_were_measured():
    """The table of docs/optimizers.md: a rare token's loss is lower with Lion's skipping, and higher with Tiger's."""
    found = {name: OmegaConf.load(CONF / f"optimizer/{name}.yaml").skip_idle_rows for name in ("lion", "tiger", "muon")}
    assert found == {"lion": True, "tiger": False, "muon": True}
