"""Which parameters a first backward pass reaches."""

import pytest
import torch
from torch import nn

from llm.errors import ConfigError
from llm.optim.gradients import FirstGradients


def pair():
    return nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})


def test_parameters_that_no_loss_depends_on_are_named():
    model = pair()
    watched = FirstGradients(model)
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(ConfigError, match=r"model\.idle\.weight: no loss depends on it \(2 such parameters\)"):
        watched.check(lambda counts: counts)


def test_what_another_rank_reached_or_is_not_trained_is_no_mistake():
    model = pair()
    watched = FirstGradients(model)
    model["used"](torch.ones(1, 2)).sum().backward()
    watched.check(lambda counts: counts + 1)
    model["idle"].requires_grad_(False)
    watched = FirstGradients(model)
    model["used"](torch.ones(1, 2)).sum().backward()
    watched.check(lambda counts: counts)


def test_nothing_is_watched_after_the_check():
    model = pair()
    watched = FirstGradients(model)
    (model["used"](torch.ones(1, 2)) + model["idle"](torch.ones(1, 2))).sum().backward()
    watched.check(lambda counts: counts)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
