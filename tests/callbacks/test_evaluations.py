"""Evaluations during training give the results of eval.py."""

import json

import pytest

from llm.commands.evaluate import evaluate
from llm.config.check import check
from llm.errors import ConfigError
from llm.training.train import train


def test_evaluations_along_a_run_equal_those_of_its_checkpoint(composed, tiny, judging, tmp_path):
    chosen = "eval=[loss,attention]"
    settings = ("trainer.precision=32-true", "callbacks.samples=null", "callbacks.evaluations.every_validations=2")
    loss = train(composed(*tiny, *settings, chosen, "max_steps=8", "val_every=2", "checkpoint_every=4"), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "eval/loss.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8]
    # sums in fp64 of the same batches by the same code
    assert records[-1]["found"]["val/loss"] == pytest.approx(loss, abs=1e-6)
    evaluate(judging(f"run_dir={tmp_path}", chosen), tmp_path / "after")
    for name in ("loss", "attention"):
        along = json.loads((tmp_path / f"eval/{name}.jsonl").read_text().splitlines()[-1])["found"]
        assert along == json.loads((tmp_path / f"after/{name}.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/attention/attention entropy" in line] == [4, 8]
    assert lines[-1]["eval/loss/loss"] == pytest.approx(loss, abs=1e-6)


def test_an_evaluation_that_cannot_be_is_refused_before_training(composed, tiny):
    with pytest.raises(ConfigError, match=r"eval\.extrapolation\.factors"):
        check(composed(*tiny, "eval=[extrapolation]", "eval.extrapolation.factors=[2,1]"))
    with pytest.raises(ConfigError, match=r"eval\.lm_eval\.tasks=\?\?\?: a value is needed"):
        check(composed(*tiny, "eval=[lm_eval]"))
