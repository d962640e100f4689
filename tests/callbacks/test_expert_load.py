import logging
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from llm.callbacks.expert_load import ExpertLoad, draw_expert_load
from llm.errors import ConfigError


class StandInTrainer(L.Trainer):
    """The two figures that the callback reads."""

    global_step: Any = 0
    is_global_zero: Any = True

    def __init__(self) -> None:
        pass


class Harness:
    """Feeds an alarm counts a step at a time, as training would."""

    def __init__(self, folder, alarm_after):
        self.callback = ExpertLoad(run_folder=folder, alarm_after=alarm_after)
        trained = {"parameters": lambda: [torch.ones(1, requires_grad=True)]}
        self.dense = SimpleNamespace(ffn=object(), **trained)
        self.moe = SimpleNamespace(ffn=SimpleNamespace(), **trained)
        self.moe.ffn.update_counts = torch.zeros(3, dtype=torch.long)
        self.module = SimpleNamespace(model=SimpleNamespace(layers=[self.dense, self.moe]))
        self.trainer = StandInTrainer()
        self.callback.on_train_start(self.trainer, self.module)

    def step(self, counts):
        self.moe.ffn.update_counts.copy_(torch.tensor(counts))
        self.callback.on_train_batch_end(self.trainer, self.module)  # a micro-batch that ends no update
        self.trainer.global_step += 1
        self.callback.on_train_batch_end(self.trainer, self.module)
        return self.callback.step_metrics(self.trainer, self.module)


def test_figures_are_those_of_the_whole_update_and_stay_when_the_next_one_comes(folder):
    harness = Harness(folder, alarm_after=100)
    metrics = harness.step([6, 2, 0])
    harness.step([0, 0, 8])
    assert set(metrics) == {"train/layer1/expert_load_global", "train/layer1/max_violation_global"}
    assert metrics["train/layer1/expert_load_global"].tolist() == [0.75, 0.25, 0.0]
    assert float(metrics["train/layer1/max_violation_global"]) == pytest.approx(6 / (8 / 3) - 1)


def test_an_expert_without_a_token_is_named_once(folder, caplog):
    harness = Harness(folder, alarm_after=5)
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            harness.step([4, 0, 4])
    assert len(caplog.records) == 1
    assert "layer 1: experts 1 received no token in 5 updates" in caplog.text


def test_an_expert_that_has_a_token_now_and_then_is_not_named(folder, caplog):
    harness = Harness(folder, alarm_after=5)
    with caplog.at_level(logging.WARNING):
        for step in range(20):
            harness.step([4, int(step % 4 == 0), 4])
    assert not caplog.records


def test_an_expert_that_falls_idle_again_is_named_again(folder, caplog):
    harness = Harness(folder, alarm_after=5)
    with caplog.at_level(logging.WARNING):
        for step in range(40):
            harness.step([4, int(step in (0, 20)), 4])
    assert len(caplog.records) == 2


def test_the_picture_has_a_panel_per_layer_and_is_not_drawn_without_experts(tmp_path):
    lines = [
        {"step": step, **{f"train/layer{i}/expert_load_global": torch.rand(8).tolist() for i in range(layers)}}
        for layers in (2,)
        for step in range(1, 301)
    ]
    draw_expert_load([*lines, {"step": 301, "train/loss": 1.0}], tmp_path / "two.png")
    draw_expert_load([{k: v for k, v in line.items() if "layer1" not in k} for line in lines], tmp_path / "one.png")
    draw_expert_load([{"step": 1, "train/loss": 1.0}], tmp_path / "none.png")
    heights = {name: int.from_bytes((tmp_path / name).read_bytes()[20:24], "big") for name in ("one.png", "two.png")}
    assert heights["two.png"] > 1.5 * heights["one.png"]
    assert not (tmp_path / "none.png").exists()


def test_an_alarm_after_no_update_is_refused(folder):
    with pytest.raises(ConfigError, match=r"callbacks\.expert_load\.alarm_after=0"):
        ExpertLoad(run_folder=folder, alarm_after=0)
