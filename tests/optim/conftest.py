from typing import ClassVar

import pytest
import torch
from torch import nn

from llm.optim.param_groups import build_param_groups


class Gain(nn.Module):
    parameter_kinds: ClassVar = {"weight": "vector"}

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Experts(nn.Module):
    parameter_kinds: ClassVar = {"weight": "matrix"}

    def __init__(self, experts, rows, columns):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, rows, columns) / columns**0.5)


class Head(nn.Linear):
    parameter_kinds: ClassVar = {"weight": "head"}


class Zoo(nn.Module):
    """One parameter of every kind and shape that a rule treats apart."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.tall = nn.Linear(8, 24)
        self.wide = nn.Linear(24, 8, bias=False)
        self.square = nn.Linear(8, 8, bias=False)
        self.experts = Experts(3, 8, 8)
        self.norm = Gain(8)
        self.head = Head(8, 13, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        x = self.wide(torch.tanh(self.tall(x))) + self.square(x)
        x = x + torch.einsum("eij,...j->...i", self.experts.weight, x)
        return self.head(self.norm.weight * x)


@pytest.fixture
def zoo():
    torch.manual_seed(0)
    return Zoo()


@pytest.fixture
def groups_of():
    """Tagged groups of a module, of which `decayed_kinds` decay."""

    def build(module: nn.Module, *, lr: float = 0.1, weight_decay: float = 0.0, decayed_kinds=("matrix",)):
        groups = build_param_groups(module, lr=lr, weight_decay=weight_decay)
        return [group | {"weight_decay": weight_decay * (group["kind"] in decayed_kinds)} for group in groups]

    return build


@pytest.fixture
def set_gradients():
    """Give every parameter a seeded gradient, the same for the same seed."""

    def fill(module: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    return fill
