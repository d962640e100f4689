from typing import ClassVar

import pytest
import torch
from torch import nn

from llm.errors import ConfigError
from llm.optim.param_groups import build_param_groups, check_partition, parameter_kinds


class Gain(nn.Module):
    parameter_kinds: ClassVar = {"weight": "vector"}

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class Head(nn.Linear):
    parameter_kinds: ClassVar = {"weight": "head"}


class Model(nn.Module):
    def __init__(self, *, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.q_proj = nn.Linear(4, 4)
        self.norm = Gain()
        self.head = Head(4, 7, bias=False)
        self.parameter_heads = {"q_proj.weight": 2}
        if tied:
            self.head.weight = self.embedding.weight


def test_the_module_that_owns_a_parameter_declares_its_kind():
    assert parameter_kinds(Model()) == {
        "embedding.weight": "embedding",
        "q_proj.weight": "matrix",
        "q_proj.bias": "vector",
        "norm.weight": "vector",
        "head.weight": "head",
    }


def test_a_tied_head_appears_once_as_an_embedding():
    kinds = parameter_kinds(Model(tied=True))
    assert kinds["embedding.weight"] == "embedding"
    assert "head.weight" not in kinds


def test_frozen_parameters_are_in_no_group():
    model = Model()
    model.q_proj.weight.requires_grad_(False)
    assert "q_proj.weight" not in parameter_kinds(model)


def test_groups_partition_the_trainable_parameters_and_decay_matrices_only():
    model = Model()
    groups = build_param_groups(model, lr=0.1, weight_decay=0.2)
    grouped = [name for group in groups for name in group["names"]]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())
    named = dict(model.named_parameters())
    for group in groups:
        assert [id(p) for p in group["params"]] == [id(named[name]) for name in group["names"]]
        assert group["weight_decay"] == (0.2 if group["kind"] == "matrix" else 0.0)
        assert group["lr"] == 0.1


def test_the_resting_value_is_one_for_gains_and_zero_otherwise():
    (vectors,) = [g for g in build_param_groups(Model(), lr=0.1, weight_decay=0.0) if g["kind"] == "vector"]
    assert dict(zip(vectors["names"], vectors["resting_values"], strict=True)) == {
        "norm.weight": 1.0,
        "q_proj.bias": 0.0,
    }


def test_groups_state_the_heads_that_are_stacked_in_each_matrix():
    (matrices,) = [g for g in build_param_groups(Model(), lr=0.1, weight_decay=0.0) if g["kind"] == "matrix"]
    assert matrices["heads"] == [2]


def test_an_unclaimed_parameter_is_an_error_that_names_module_and_parameter():
    model = Model()
    model.norm.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ConfigError, match=r"norm \(Gain\) does not claim its parameter 'extra'"):
        parameter_kinds(model)


def test_an_unknown_kind_is_an_error_with_a_suggestion():
    model = Model()
    model.norm.parameter_kinds = {"weight": "vectors"}
    with pytest.raises(ConfigError, match="did you mean vector"):
        parameter_kinds(model)


def test_a_shared_tensor_with_contradictory_claims_is_an_error():
    model = Model()
    model.q_proj.bias = model.norm.weight
    assert parameter_kinds(model)["q_proj.bias"] == "vector"
    model.norm.parameter_kinds = {"weight": "matrix"}
    with pytest.raises(ConfigError, match="claimed twice"):
        parameter_kinds(model)


def test_a_model_without_trainable_parameters_is_an_error():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build_param_groups(Model().requires_grad_(False), lr=0.1, weight_decay=0.0)


def test_missing_repeated_and_foreign_parameters_break_the_partition():
    model = Model()
    groups = build_param_groups(model, lr=0.1, weight_decay=0.0)
    with pytest.raises(ConfigError, match="1 parameters in no group"):
        check_partition(model, groups[1:])
    with pytest.raises(ConfigError, match="in several"):
        check_partition(model, [*groups, groups[0]])
    groups[0]["params"].append(nn.Parameter(torch.zeros(1)))
    with pytest.raises(ConfigError, match="1 not of the model"):
        check_partition(model, groups)
