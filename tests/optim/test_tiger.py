import copy

import pytest
import torch
from torch import nn

from llm.errors import ConfigError
from llm.optim.tiger import Tiger


def tiger(groups, **options):
    defaults = {
        "lr": 0.01,
        "weight_decay": 0.01,
        "beta": 0.9,
        "min_rms": 0.0,
        "min_rms_ratio": 0.0,
        "shrink_ratio": None,
        "accumulate": "buffer",
        "skip_idle_rows": True,
    }
    return Tiger(groups, **(defaults | options))


def rms(x):
    return x.square().mean().sqrt()


def test_the_first_step_follows_the_rate_of_each_kind(zoo, groups_of, set_gradients):
    optimizer = tiger(groups_of(zoo, lr=0.1, weight_decay=0.5))
    set_gradients(zoo, 0)
    before = {name: p.detach().clone() for name, p in zoo.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in zoo.named_parameters()}
    optimizer.step()
    for name, parameter in zoo.named_parameters():
        old, sign = before[name], gradients[name].sign()
        if parameter.ndim == 1:
            expected = old - 0.05 * sign
        elif name == "embedding.weight":
            expected = old - 0.1 * old.square().mean(1, keepdim=True).sqrt() * sign
        elif name == "experts.weight":
            expected = old - 0.1 * old.square().mean((1, 2), keepdim=True).sqrt() * (sign + 0.5 * old)
        elif name == "head.weight":
            expected = old - 0.1 * rms(old) * sign
        else:
            expected = old - 0.1 * rms(old) * (sign + 0.5 * old)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_the_floor_is_a_share_of_the_initial_standard_deviation(zoo, groups_of, set_gradients):
    groups = groups_of(zoo, lr=0.1)
    for group in groups:
        group["initial_stds"] = [2.0 for _ in group["names"]]
    optimizer = tiger(groups, min_rms_ratio=0.5)
    with torch.no_grad():
        zoo.experts.weight[1] = 0.01
        zoo.embedding.weight[3] = 0.01
    set_gradients(zoo, 0)
    before = {name: p.detach().clone() for name, p in zoo.named_parameters()}
    optimizer.step()
    expert = (zoo.experts.weight - before["experts.weight"])[1].abs()
    row = (zoo.embedding.weight - before["embedding.weight"])[3].abs()
    torch.testing.assert_close(expert, torch.full_like(expert, 0.1 * 0.5 * 2.0))
    torch.testing.assert_close(row, torch.full_like(row, 0.1 * 0.5 * 2.0))
    assert optimizer.floors({"names": ["a"], "initial_stds": [0.0045]}) == [pytest.approx(0.00225)]


def test_the_second_step_uses_the_decayed_momentum(groups_of):
    norm = nn.LayerNorm(2, bias=False)
    optimizer = tiger(groups_of(norm, lr=0.2))
    norm.weight.grad = torch.tensor([1.0, 1.0])
    optimizer.step()  # m = 0.1 g
    norm.weight.grad = torch.tensor([-0.8, -1.0])
    optimizer.step()  # m = 0.9 * 0.1 - 0.1 * (0.8, 1.0) = (0.01, -0.01)
    torch.testing.assert_close(norm.weight.data, torch.tensor([0.8, 1.0]))


def test_a_matrix_of_zeros_moves_only_with_a_lower_bound_of_its_size(groups_of):
    for floor, expected in ((0.0, 0.0), (0.5, 0.05)):
        linear = nn.Linear(3, 3, bias=False)
        nn.init.zeros_(linear.weight)
        optimizer = tiger(groups_of(linear, lr=0.1), min_rms=floor)
        linear.weight.grad = torch.ones(3, 3)
        optimizer.step()
        torch.testing.assert_close(linear.weight.data, torch.full((3, 3), -expected))


def test_a_larger_matrix_takes_proportionally_larger_steps(groups_of, set_gradients):
    """Scaling a matrix by 64 scales its whole trajectory: exact, since 64 is a power of two."""
    one = nn.Linear(5, 7, bias=False)
    two = copy.deepcopy(one)
    two.weight.data.mul_(64)
    for module in (one, two):
        optimizer = tiger(groups_of(module, lr=0.01, weight_decay=0.0))
        for step in range(50):
            set_gradients(module, step)
            optimizer.step()
    assert torch.equal(one.weight * 64, two.weight)


@pytest.mark.parametrize("micro_steps", [2, 4, 16])
def test_accumulating_in_the_momentum_equals_accumulating_in_a_buffer(zoo, groups_of, micro_steps):
    zoo.double()
    other = copy.deepcopy(zoo)
    modules = {"buffer": zoo, "momentum": other}
    optimizers = {
        how: tiger(groups_of(m, lr=1e-3, weight_decay=0.1), accumulate=how, min_rms=0.01) for how, m in modules.items()
    }
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        batches = torch.randint(13, (micro_steps, 6, 5), generator=generator)
        for how, module in modules.items():
            optimizers[how].zero_grad()
            for batch in batches:
                (module(batch).square().mean() / micro_steps).backward()
                if how == "momentum":
                    assert all(p.grad is None for p in module.parameters())
            optimizers[how].step()
    for left, right in zip(zoo.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
        ours, theirs = (optimizers[h].state[p]["momentum"] for h, p in (("momentum", right), ("buffer", left)))
        # k fp32 roundings of sums of k gradients, against one: a few units of 6e-8, relative to the largest
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_folding_skips_rows_idle_over_the_whole_cycle_only(zoo, groups_of):
    optimizer = tiger(groups_of(zoo), accumulate="momentum")
    zoo(torch.arange(13)[None]).square().mean().backward()
    optimizer.step()
    before = zoo.embedding.weight.clone()
    for ids in ([1, 2], [2, 5]):
        zoo(torch.tensor([ids])).square().mean().backward()
    optimizer.step()
    moved = (zoo.embedding.weight != before).any(1)
    assert moved.nonzero().flatten().tolist() == [1, 2, 5]


def test_a_tensor_with_a_non_finite_gradient_keeps_its_momentum_and_shrinks_to_its_resting_value(
    zoo, groups_of, set_gradients
):
    optimizer = tiger(groups_of(zoo), shrink_ratio=0.99)
    set_gradients(zoo, 0)
    optimizer.step()
    before = {name: p.detach().clone() for name, p in zoo.named_parameters()}
    momenta = {name: optimizer.state[p]["momentum"].clone() for name, p in zoo.named_parameters()}
    set_gradients(zoo, 1)
    zoo.tall.weight.grad[2, 3] = float("nan")
    zoo.norm.weight.grad[0] = float("inf")
    optimizer.step()
    for name, parameter in zoo.named_parameters():
        broken = name in ("tall.weight", "norm.weight")
        assert torch.equal(optimizer.state[parameter]["momentum"], momenta[name]) == broken
        assert optimizer.state[parameter].get("shrunk", 0) == int(broken)
    torch.testing.assert_close(zoo.tall.weight.data, before["tall.weight"] * 0.99)
    torch.testing.assert_close(zoo.norm.weight.data, (before["norm.weight"] - 1) * 0.99 + 1)


def test_a_non_finite_first_micro_batch_does_not_lose_the_decay_of_the_cycle(groups_of):
    norm = nn.LayerNorm(1, bias=False)
    optimizer = tiger(groups_of(norm), shrink_ratio=0.99, accumulate="momentum")

    def micro_batch(value):
        (norm.weight * value).sum().backward()

    micro_batch(1.0)
    optimizer.step()
    for value in (float("nan"), 0.5):
        micro_batch(value)
    optimizer.step()
    momentum = optimizer.state[norm.weight]["momentum"]
    torch.testing.assert_close(momentum, torch.tensor([0.9 * 0.1 + 0.1 * 0.5]))


def test_a_non_finite_last_micro_batch_replaces_the_update(groups_of):
    norm = nn.LayerNorm(1, bias=False)
    optimizer = tiger(groups_of(norm), shrink_ratio=0.5, accumulate="momentum")
    for value in (1.0, float("nan")):
        (norm.weight * value).sum().backward()
    norm.weight.data.fill_(3.0)
    optimizer.step()
    assert norm.weight.item() == 3.0


def test_the_state_of_a_cycle_survives_saving_in_its_middle(zoo, groups_of):
    straight, interrupted, fresh = (copy.deepcopy(zoo) for _ in range(3))
    optimizers = {m: tiger(groups_of(m), accumulate="momentum") for m in (straight, interrupted, fresh)}
    batch = torch.arange(12).view(2, 6)
    for module in (straight, interrupted):
        module(batch).square().mean().backward()
    optimizers[fresh].load_state_dict(optimizers[interrupted].state_dict())
    for module in (straight, fresh):
        module(batch).mean().backward()
        optimizers[module].step()
    for left, right in zip(straight.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.0}, "optimizer.beta=1.0"),
        ({"min_rms": -1.0}, "optimizer.min_rms=-1.0"),
        ({"shrink_ratio": 1.0}, "optimizer.shrink_ratio=1.0"),
        ({"accumulate": "momentun"}, "did you mean momentum"),
    ],
)
def test_settings_out_of_range_are_errors(zoo, groups_of, options, message):
    with pytest.raises(ConfigError, match=message):
        tiger(groups_of(zoo), **options)
