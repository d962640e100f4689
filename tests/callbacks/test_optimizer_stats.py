import json

import pytest
from catalogue import options

from llm.callbacks.optimizer_stats import OptimizerStats
from llm.errors import ConfigError
from llm.training import train

NODE = (
    "+callbacks.optimizer_stats={_target_: llm.callbacks.optimizer_stats.OptimizerStats, "
    "every: 2, orthogonality_samples: 3}"
)


def metrics_of(composed, tiny, tmp_path, *overrides):
    short = ("max_steps=4", "val_every=4", "checkpoint_every=4", "callbacks.samples=null", "logger=csv")
    train(composed(*tiny, *short, NODE, *overrides), tmp_path)
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", options("optimizer"))
def test_every_second_update_reports_what_each_kind_did(composed, tiny, tmp_path, name):
    rows = {row["step"]: row for row in metrics_of(composed, tiny, tmp_path, f"optimizer={name}")}
    for step, row in rows.items():
        assert ("optimizer/update_rms/matrix" in row) == (step % 2 == 0)
    for kind in ("matrix", "embedding", "vector"):
        assert rows[4][f"optimizer/update_rms/{kind}"] > 0
        ratio = rows[4][f"optimizer/update_rms/{kind}"] / rows[4][f"optimizer/weight_rms/{kind}"]
        assert rows[4][f"optimizer/update_ratio/{kind}"] == pytest.approx(ratio, rel=1e-4)
        assert rows[4][f"optimizer/grad_norm/{kind}"] > 0
    squares = sum(v**2 for k, v in rows[4].items() if k.startswith("optimizer/grad_norm/"))
    assert squares**0.5 == pytest.approx(rows[4]["grad_norm"], rel=1e-3)
    assert ("optimizer/orthogonality_error/matrix" in rows[4]) == (name == "muon")
    if name == "muon":
        assert rows[4]["optimizer/orthogonality_error/matrix"] < 0.6


@pytest.mark.parametrize("wrong", [{"every": 0}, {"orthogonality_samples": 0}])
def test_settings_out_of_range_are_errors(wrong):
    with pytest.raises(ConfigError, match="must be at least 1"):
        OptimizerStats(**({"every": 1, "orthogonality_samples": 1} | wrong))
