import re
from functools import partial

import pytest
import torch
from catalogue import CONF, options
from hydra.utils import instantiate
from omegaconf import OmegaConf

from llm.optim.lion import Lion
from llm.optim.muon import Muon
from llm.optim.sgd import SGD
from llm.scaling.derivation import derivation
from llm.scaling.rules import linear, none, sign
from llm.scaling.suitability import INSTEAD, SUITS, family_of, mismatch


def test_one_line_describes_how_the_rate_was_derived():
    rule = partial(sign, base_batch_tokens=16_000, noise_scale=41_000, alignment=1.0)
    assert derivation(rule, lr=3e-3, batch_tokens=64_000) == (
        "lr 3.0e-3 -> 4.4e-3: sign rule, batch 16k -> 64k tokens, noise scale 41k"
    )
    rule = partial(linear, base_batch_tokens=8192)
    assert derivation(rule, lr=0.1, batch_tokens=512) == "lr 1.0e-1 -> 6.3e-3: linear rule, batch 8.19k -> 512 tokens"


def test_an_unchanged_rate_is_described_as_given():
    rule = partial(linear, base_batch_tokens=8192)
    assert (
        derivation(rule, lr=4e-3, batch_tokens=8192)
        == "lr 4.0e-3 as given: linear rule at its base, batch 8.19k tokens"
    )
    rule = partial(none, base_batch_tokens=8192)
    assert derivation(rule, lr=4e-3, batch_tokens=512) == "lr 4.0e-3 as given: no rule, batch 512 tokens"


@pytest.mark.parametrize("name", options("optimizer"))
def test_every_optimizer_states_the_kind_of_its_steps(name):
    factory = instantiate(OmegaConf.load(CONF / "optimizer" / f"{name}.yaml"), _convert_="all")
    assert family_of(factory.func) in INSTEAD


def test_an_unsuitable_rule_gives_a_warning_with_the_reason_and_a_better_rule():
    warning = mismatch("linear", Lion)
    assert warning is not None
    assert "does not suit Lion, whose steps are of the kind sign: a step that does not grow" in warning
    assert "use scaling=sqrt, which lost less" in warning
    assert "use scaling=none" in (mismatch("sqrt", SGD) or "")


REGRETS = re.search(
    r"^\| \| adamw \| lion \| muon \| sgd \|$.*?\n\n", (CONF.parent / "docs" / "scaling.md").read_text(), re.M | re.S
)
"""The table of measured regrets in docs/scaling.md."""

SPREAD = {"sgd": 0.2}
"""Spread of SGD's losses over seeds, in nats, within which its rules cannot be told apart."""


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_the_recommended_rule_lost_less_than_each_rule_with_a_warning(name):
    column = ["adamw", "lion", "muon", "sgd"].index(name)
    rows = re.findall(
        r"^\| `(\w+)`(?:, own momentum)? \| (.+) \|$", REGRETS[0], re.M
    )  # the default, own momentum, is last
    regret = {rule: float(cells.split(" | ")[column].strip("*")) for rule, cells in rows}
    optimizer = instantiate(OmegaConf.load(CONF / "optimizer" / f"{name}.yaml"), _convert_="all").func
    recommended = regret[INSTEAD[family_of(optimizer)]]
    warned_of = [rule for rule in SUITS if mismatch(rule, optimizer)]
    assert warned_of
    assert all(recommended < regret[rule] + SPREAD.get(name, 0.0) for rule in warned_of)


@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [("linear", SGD), ("sqrt", torch.optim.AdamW), ("sign", Muon), ("variance", Muon), ("none", Lion)],
)
def test_a_rule_that_suits_gives_no_warning(rule, optimizer):
    assert mismatch(rule, optimizer) is None


def test_an_optimizer_with_unknown_steps_gives_no_warning():
    assert mismatch("linear", torch.optim.LBFGS) is None


def test_the_recommended_rule_suits():
    for family, rule in INSTEAD.items():
        assert rule == "none" or family in SUITS[rule][0]
