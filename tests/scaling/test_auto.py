import json
import logging

import pytest
from catalogue import options

from llm.config.check import check
from llm.config.files import load
from llm.config.pieces import instantiate
from llm.config.signatures import locate
from llm.scaling.suitability import mismatch
from llm.training.plan import describe_plan
from llm.training.train import train

SUITED = {"adamw": "sqrt", "lion": "sqrt", "muon": "sqrt", "sgd": "none", "tiger": "sqrt"}
"""What docs/scaling.md finds for each."""


@pytest.mark.parametrize("optimizer", options("optimizer"))
def test_each_optimizer_has_the_rule_that_was_measured_for_it(composed, optimizer):
    cfg = composed(f"optimizer={optimizer}", "batch_tokens=32768")
    assert cfg["scaling"] == {
        "_target_": f"llm.scaling.rules.{SUITED[optimizer]}",
        "_partial_": True,
        "base_batch_tokens": 8192,
    }
    check(cfg)
    assert mismatch(SUITED[optimizer], locate(cfg["optimizer"]["_target_"])) is None


@pytest.mark.parametrize("optimizer", options("optimizer"))
def test_nothing_changes_at_the_base_batch(composed, optimizer):
    cfg = composed(f"optimizer={optimizer}")
    assert instantiate(cfg["scaling"])(cfg["batch_tokens"]) == 1.0


def test_a_rule_that_is_set_by_hand_is_kept(composed):
    assert composed("optimizer=lion", "scaling=none")["scaling"]["_target_"] == "llm.scaling.rules.none"
    assert composed("optimizer=sgd", "scaling=variance")["scaling"]["_target_"] == "llm.scaling.rules.variance"


@pytest.mark.parametrize("target", ["torch.optim.LBFGS", "llm.optim.nowhere.Rule", "os.system"])
def test_the_rate_of_an_optimizer_with_unknown_steps_is_not_scaled(composed, target):
    assert composed(f"optimizer._target_={target}")["scaling"]["_target_"] == "llm.scaling.rules.none"


def test_the_rule_in_use_is_named_in_log_receipt_and_configuration(composed, tiny, tmp_path, caplog):
    line = "lr 1.0e-3 -> 2.0e-3: sqrt rule, batch 64 -> 256 tokens; half-life in tokens of averages x 4"
    cfg = composed(*tiny, "optimizer=lion", "scaling.base_batch_tokens=64", "schedule=constant", "schedule.warmup=0")
    with caplog.at_level(logging.INFO):
        train(cfg, tmp_path)
    assert any(message.startswith(line) for message in caplog.messages)
    assert (tmp_path / "optimizer.txt").read_text().startswith(line)
    assert load(tmp_path / "config.yaml")["scaling"]["_target_"] == "llm.scaling.rules.sqrt"
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {row["lr/matrix"] for row in rows} == {2e-3}


def test_a_plan_states_how_the_rate_is_derived(composed, tiny):
    assert "lr 4.0e-3 -> 8.0e-3: sqrt rule, batch 64 -> 256 tokens" in describe_plan(
        check(composed(*tiny, "scaling.base_batch_tokens=64"))
    )
    probed = describe_plan(check(composed(*tiny, "scaling=sign", "scaling.base_batch_tokens=64")))
    assert "lr 4.0e-3 at the base batch; the rest follows from a noise scale" in probed


@pytest.mark.parametrize("path", options("experiment"))
def test_experiments_set_rates_that_are_not_scaled(composed, path):
    assert composed(f"experiment={path}")["scaling"]["_target_"] == "llm.scaling.rules.none"
