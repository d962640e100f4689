"""The contract of optimizers, checked for every option of conf/optimizer."""

import copy
import io
import pickle

import pytest
import torch
from catalogue import build_piece, options
from torch import nn

from llm.contracts import DescribedOptimizer, ShardedOptimizer
from llm.errors import CheckpointError, ConfigError, ShapeError
from llm.optim.grouped_optimizer import GroupedOptimizer
from llm.optim.receipt import lines

CATALOGUE = options("optimizer")
OURS = [name for name in CATALOGUE if name != "adamw"]
BYTES = {"adamw": {8}, "lion": {4}, "tiger": {4}, "muon": {4, 8}}
"""State a parameter, of matrices and of the rest."""


def build(name, groups, **settings):
    return build_piece("optimizer", name, params=groups, **settings)


def train(module, optimizer, steps, *, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(13, (4, 6), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize("name", OURS)
def test_a_new_optimizer_of_the_project_has_the_capabilities_that_zero_asks_for(name, groups_of):
    optimizer = build(name, groups_of(nn.Linear(8, 8, bias=False), lr=0.1))
    assert isinstance(optimizer, ShardedOptimizer)
    assert isinstance(optimizer, DescribedOptimizer)


@pytest.mark.parametrize("name", CATALOGUE)
def test_it_lowers_a_quadratic(name, groups_of):
    module, target = nn.Linear(8, 8, bias=False), torch.eye(8)
    # steps of about 0.02 an element, whatever the rule measures lr in
    optimizer = build(name, groups_of(module, lr={"muon": 0.03, "tiger": 0.1}.get(name, 0.02)))
    losses = []
    for _ in range(60):
        loss = (module.weight - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("name", CATALOGUE)
def test_resumed_equals_uninterrupted_bit_for_bit(name, zoo, groups_of):
    straight, resumed = zoo, copy.deepcopy(zoo)
    train(straight, build(name, groups_of(straight, lr=0.01, weight_decay=0.1)), 8)
    first = build(name, groups_of(resumed, lr=0.01, weight_decay=0.1))
    train(resumed, first, 3)
    file = io.BytesIO()
    torch.save({"model": resumed.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # plain tensors and numbers only
    fresh = copy.deepcopy(zoo)
    fresh.load_state_dict(saved["model"])
    second = build(name, groups_of(fresh, lr=0.01, weight_decay=0.1))
    second.load_state_dict(saved["optimizer"])
    train(fresh, second, 5, start=3)
    for left, right in zip(straight.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", CATALOGUE)
def test_it_never_writes_to_the_gradients(name, zoo, groups_of, set_gradients):
    optimizer = build(name, groups_of(zoo, lr=0.01, weight_decay=0.1))
    for step in range(2):
        set_gradients(zoo, step)
        before = [parameter.grad.clone() for parameter in zoo.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, old) for p, old in zip(zoo.parameters(), before, strict=True))


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_parameter_without_a_gradient_and_its_state_do_not_change(name, zoo, groups_of, set_gradients):
    optimizer = build(name, groups_of(zoo, lr=0.01, weight_decay=0.1))
    set_gradients(zoo, 0)
    optimizer.step()
    weights, state = copy.deepcopy(zoo.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(weights[key], value) for key, value in zoo.state_dict().items())
    for index, held in optimizer.state_dict()["state"].items():
        for key, value in held.items():
            assert torch.equal(torch.as_tensor(state[index][key]), torch.as_tensor(value)), key


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_closure_runs_once_with_gradients_and_its_loss_is_returned(name, zoo, groups_of):
    optimizer, calls = build(name, groups_of(zoo)), []

    def closure():
        loss = zoo(torch.tensor([[1, 2]])).square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == 1


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_state_has_the_size_that_the_receipt_predicted(name, zoo, groups_of, set_gradients):
    optimizer = build(name, groups_of(zoo, lr=0.01, weight_decay=0.1))
    before = lines(optimizer)
    set_gradients(zoo, 0)
    optimizer.step()
    assert [line.state_bytes for line in lines(optimizer)] == [line.state_bytes for line in before]
    assert {line.state_bytes / line.numel for line in before} == BYTES.get(name, {4})


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_tensor_gets_its_groups_lr_times_the_schedule(name, zoo, groups_of, set_gradients):
    optimizer = build(name, groups_of(zoo, lr=0.01, weight_decay=0.1))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    set_gradients(zoo, 0)
    before = copy.deepcopy(zoo.state_dict())
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in zoo.state_dict().items())


@pytest.mark.parametrize("name", OURS)
def test_a_flattened_matrix_is_refused_at_the_start_and_later(name, zoo, groups_of, set_gradients):
    groups = groups_of(zoo)
    optimizer = build(name, groups)
    flat = nn.Parameter(torch.zeros(24 * 8))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"][0] = flat
    with pytest.raises(ShapeError, match=r"tall.weight=\(192,\).*flattened"):
        optimizer.step()
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ShapeError, match="merged into 1"):
        optimizer.step()
    groups[0]["params"][0] = flat
    with pytest.raises(ShapeError, match="flattened"):
        build(name, groups)


@pytest.mark.parametrize("name", OURS)
def test_groups_without_kinds_are_refused(name, zoo):
    with pytest.raises(ConfigError):
        build(name, [{"params": list(zoo.parameters())}])


@pytest.mark.parametrize("name", OURS)
def test_the_state_of_another_architecture_is_refused(name, zoo, groups_of):
    state = build(name, groups_of(zoo)).state_dict()
    state["param_groups"][0]["names"][0] = "other.weight"
    with pytest.raises(CheckpointError, match=r"other\.weight"):
        build(name, groups_of(zoo)).load_state_dict(state)


@pytest.mark.parametrize("name", OURS)
def test_bfloat16_parameters_keep_fp32_state_also_through_a_checkpoint(name, zoo, groups_of, set_gradients):
    zoo.bfloat16()
    optimizer = build(name, groups_of(zoo, lr=0.05))
    set_gradients(zoo, 0)
    optimizer.step()
    again = build(name, groups_of(zoo, lr=0.05))
    again.load_state_dict(optimizer.state_dict())
    for parameter in zoo.parameters():
        assert parameter.isfinite().all()
        for key, value in optimizer.state[parameter].items():
            assert again.state[parameter][key].dtype == value.dtype == torch.float32
            assert torch.equal(again.state[parameter][key], value)


@pytest.mark.parametrize("name", OURS)
def test_it_is_one_of_the_projects_optimizers(name, zoo, groups_of):
    assert isinstance(build(name, groups_of(zoo)), GroupedOptimizer)


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copied_optimizer_steps_as_its_original(name, copied, zoo, groups_of, set_gradients):
    optimizer = build(name, groups_of(zoo, lr=0.01, weight_decay=0.1))
    set_gradients(zoo, 0)
    optimizer.step()
    other = copied(optimizer)
    for step in (1, 2):
        set_gradients(zoo, step)
        for left, right in zip(optimizer.param_groups, other.param_groups, strict=True):
            for own, its in zip(left["params"], right["params"], strict=True):
                its.grad = own.grad.clone()
        optimizer.step()
        other.step()
    for left, right in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert all(torch.equal(own, its) for own, its in zip(left["params"], right["params"], strict=True))


@pytest.mark.parametrize("name", OURS)
def test_the_layout_of_a_parameter_in_memory_does_not_change_its_update(name, groups_of):
    start, gradients = torch.randn(24, 8), [torch.randn(24, 8) for _ in range(3)]
    updated = []
    for weight in (start.clone(), start.t().contiguous().t()):
        module = nn.Linear(8, 24, bias=False)
        module.weight = nn.Parameter(weight)
        optimizer = build(name, groups_of(module, lr=0.01, weight_decay=0.1))
        for gradient in gradients:
            module.weight.grad = gradient.clone()
            optimizer.step()
        updated.append(module.weight.detach().clone().contiguous())
    torch.testing.assert_close(*updated, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CATALOGUE)
def test_an_empty_parameter_is_not_changed(name, groups_of):
    module = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 0, bias=False), nn.Linear(0, 4, bias=False)])
    optimizer = build(name, groups_of(module, lr=0.01, weight_decay=0.1))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.isfinite(module[0].weight).all()
