"""A run that is resumed with more updates follows its new schedule from the first update on, and reports the jump."""

import json
import logging

import pytest

from llm.training.train import train

SHORT = ("val_every=4", "checkpoint_every=4", "callbacks.samples=null", "optimizer.lr=0.01", "schedule.warmup=1")


def rates(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["lr/matrix"] for row in rows}


@pytest.fixture
def extended(composed, tiny, tmp_path, caplog):
    def make(*settings):
        train(composed(*tiny, *SHORT, *settings, "max_steps=4"), tmp_path)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="llm"):
            train({**composed(*tiny, *SHORT, *settings, "max_steps=8"), "resume": str(tmp_path)}, tmp_path)
        return rates(tmp_path), [message for message in caplog.messages if "learning rate" in message]

    return make


def test_an_extended_cosine_runs_at_its_new_rate_at_once_and_says_by_how_much_it_rises(
    extended, composed, tiny, tmp_path_factory
):
    found, messages = extended()
    whole = tmp_path_factory.mktemp("whole")
    train(composed(*tiny, *SHORT, "max_steps=8"), whole)
    assert {step: found[step] for step in range(5, 9)} == {step: rates(whole)[step] for step in range(5, 9)}
    (message,) = messages
    assert message.startswith("max_steps=8: the learning rate rises from 0.001 to ")
    assert f"({found[5] / 0.001:.3g} times) at step 5" in message
    assert "schedule=wsd" in message


def test_a_run_whose_rate_does_not_change_reports_nothing(extended):
    _, messages = extended("schedule=constant")
    assert messages == []
