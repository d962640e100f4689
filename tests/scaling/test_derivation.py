from functools import partial

import pytest
import torch
from catalogue import CONF, options
from hydra.utils import instantiate
from omegaconf import OmegaConf

from llm.optim.lion import Lion
from llm.optim.muon import Muon
from llm.optim.sgd import SGD
from llm.scaling.derivation import INSTEAD, SUITS, derivation, family_of, mismatch
from llm.scaling.rules import linear, none, sign


def test_one_line_says_how_the_rate_came_about():
    rule = partial(sign, base_batch_tokens=16_000, noise_scale=41_000, alignment=1.0)
    assert derivation(rule, lr=3e-3, batch_tokens=64_000) == (
        "lr 3.0e-3 -> 4.4e-3: sign rule, batch 16k -> 64k tokens, noise scale 41k"
    )
    rule = partial(linear, base_batch_tokens=8192)
    assert derivation(rule, lr=0.1, batch_tokens=512) == "lr 1.0e-1 -> 6.3e-3: linear rule, batch 8.19k -> 512 tokens"


def test_a_rate_that_is_not_changed_is_said_to_be_as_given():
    rule = partial(linear, base_batch_tokens=8192)
    assert (
        derivation(rule, lr=4e-3, batch_tokens=8192)
        == "lr 4.0e-3 as given: linear rule at its base, batch 8.19k tokens"
    )
    rule = partial(none, base_batch_tokens=8192)
    assert derivation(rule, lr=4e-3, batch_tokens=512) == "lr 4.0e-3 as given: no rule, batch 512 tokens"


@pytest.mark.parametrize("name", options("optimizer"))
def test_every_optimizer_says_what_its_steps_are_made_of(name):
    factory = instantiate(OmegaConf.load(CONF / "optimizer" / f"{name}.yaml"), _convert_="all")
    assert family_of(factory.func) in INSTEAD


def test_a_rule_that_was_made_for_another_optimizer_is_warned_of_with_the_reason_and_a_better_one():
    warning = mismatch("linear", Lion)
    assert warning is not None
    assert "not derived for Lion, whose steps are of the kind sign: steps that do not grow" in warning
    assert warning.endswith("try scaling=sign")
    assert "try scaling=variance" in (mismatch("sqrt", SGD) or "")


@pytest.mark.parametrize(
    ("rule", "optimizer"), [("linear", SGD), ("sqrt", torch.optim.AdamW), ("sign", Muon), ("none", Lion)]
)
def test_a_rule_that_suits_is_not_warned_of(rule, optimizer):
    assert mismatch(rule, optimizer) is None


def test_an_optimizer_that_says_nothing_of_its_steps_is_not_warned_of():
    assert mismatch("linear", torch.optim.LBFGS) is None


def test_what_is_recommended_instead_suits():
    for family, rule in INSTEAD.items():
        assert family in SUITS[rule][0]
