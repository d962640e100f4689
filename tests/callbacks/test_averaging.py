"""Averaged weights: validation and checkpoints use the average, and a resumed run equals an uninterrupted one."""

import json

import pytest
import torch

from llm.callbacks.averaging import EMA, WindowAverage
from llm.config.check import check
from llm.errors import ConfigError
from llm.run_folder.checkpoint import load_model, load_training
from llm.training.plan import describe_plan
from llm.training.train import train

EXACT = ("trainer.precision=32-true", "callbacks.samples=null", "val_every=1", "checkpoint_every=1", "max_steps=6")
KEEP = "callbacks.checkpoints.keep=9"


@pytest.fixture
def run(composed, tiny, tmp_path):
    def make(name, *overrides):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        train(composed(*tiny, *EXACT, KEEP, *overrides), folder)
        return folder

    return make


def weights(folder, step):
    return load_model(folder / f"checkpoints/step-{step:08d}")


def current(folder, step):
    return load_training(folder / f"checkpoints/step-{step:08d}")["current_model_state"]


def test_an_ema_is_what_its_formula_says_and_training_does_not_feel_it(run):
    plain, averaged = run("plain"), run("ema", "averaging=ema", "averaging.decay=0.5")
    expected = weights(plain, 1)
    for step in range(2, 7):
        now = weights(plain, step)
        assert all(torch.equal(now[name], current(averaged, step)[name]) for name in now)
        decay = min(0.5, step / (9 + step))  # (1 + n) / (10 + n) after n = step - 1 averaged updates
        expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in now}
    for name, tensor in weights(averaged, 6).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-7, rtol=1e-6)  # fp32, five steps


def test_the_last_average_is_the_mean_of_the_last_snapshots(run):
    folder = run("last", "averaging=last", "averaging.count=2", "averaging.every=2")
    for name, tensor in weights(folder, 6).items():
        mean = (current(folder, 4)[name] + current(folder, 6)[name]) / 2
        torch.testing.assert_close(tensor, mean, atol=1e-8, rtol=1e-6)  # one addition in fp32


def test_a_window_is_the_mean_of_all_updates_from_its_start(run):
    window = run("window", "averaging=window", "averaging.start=2")
    last = run("last", "averaging=last", "averaging.count=4", "averaging.every=1")
    for name, tensor in weights(window, 6).items():
        torch.testing.assert_close(tensor, weights(last, 6)[name], atol=1e-7, rtol=1e-6)  # fp32, three steps


@pytest.mark.parametrize("average", [EMA(decay=0.9, start=0), WindowAverage(start=8)])
def test_an_average_is_the_last_iterate_of_a_run_whose_rate_decays(average):
    """For fixed updates of SGD: the share of the average behind each update is the factor of its rate."""
    steps = torch.randn(20, 5, dtype=torch.float64)
    iterates = 1.0 - steps.cumsum(0)
    mean, behind, count = iterates[average.start], torch.zeros(20, dtype=torch.float64), 1
    behind[: average.start + 1] = 1.0  # the share of the average that lies behind each update
    for t in range(average.start + 1, 20):
        share = average.share_of_next(count)
        mean, count = mean + share * (iterates[t] - mean), count + 1
        behind *= 1 - share
        behind[: t + 1] += share
    torch.testing.assert_close(1.0 - (behind[:, None] * steps).sum(0), mean, rtol=0, atol=1e-12)
    if isinstance(average, WindowAverage):  # linear over the window
        expected = torch.clamp((20 - torch.arange(20.0, dtype=torch.float64)) / 12, max=1.0)
        torch.testing.assert_close(behind, expected, rtol=0, atol=1e-12)


def test_the_plan_says_which_decay_an_average_stands_for(composed, tiny):
    for settings, answer in (
        (("averaging=window", "averaging.start=2"), "falls linearly to zero over the last 6 updates"),
        (("averaging=ema", "averaging.decay=0.5"), r"falls as 1 - 0.5^(updates left), over about the last 2 updates"),
        (("averaging=last", "averaging.count=2", "averaging.every=3"), "falls in 2 steps to zero over updates 3 to 6"),
    ):
        assert answer in describe_plan(check(composed(*tiny, *settings)))


@pytest.mark.parametrize("settings", [("averaging=ema", "averaging.start=4"), ("averaging=last", "averaging.every=5")])
def test_until_the_first_average_the_raw_weights_are_validated_and_saved(run, settings):
    plain, averaged = run("plain"), run("averaged", *settings)
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (plain, averaged)]
    assert [line["val/loss"] for line in lines[0][:4]] == [line["val/loss"] for line in lines[1][:4]]
    for step in range(1, 5):
        raw, saved = weights(plain, step), weights(averaged, step)
        assert all(torch.equal(raw[name], saved[name]) for name in raw)
    raw, saved = weights(plain, 6), weights(averaged, 6)
    assert any(not torch.equal(raw[name], saved[name]) for name in raw)


def test_the_average_of_a_short_run_has_left_its_initial_weights_behind(composed, tiny, tmp_path):
    settings = ("max_steps=24", "val_every=24", "checkpoint_every=24", "optimizer.lr=1e-2", "callbacks.samples=null")
    losses = [
        train(composed(*tiny, *settings, *averaging), tmp_path / name)
        for name, averaging in (("plain", ()), ("ema", ("averaging=ema",)))
    ]
    started = train(composed(*tiny, *settings, "optimizer.lr=1e-30"), tmp_path / "started")
    assert losses[1] - losses[0] < 0.2 * (started - losses[0])


@pytest.mark.parametrize("kind", ["ema", "last", "window"])
def test_a_resumed_run_has_the_same_average_and_the_same_losses(run, composed, tiny, kind):
    setting = {"ema": "averaging.decay=0.5", "last": "averaging.every=2", "window": "averaging.start=2"}[kind]
    settings = (f"averaging={kind}", setting)
    whole, broken = run("whole", *settings), run("broken", *settings)
    for step in (4, 5, 6):
        folder = broken / f"checkpoints/step-{step:08d}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (broken / "checkpoints/last").unlink()
    train({**composed(*tiny, *EXACT, KEEP, *settings), "resume": str(broken)}, broken)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole, 6).values(), weights(broken, 6).values(), strict=True))
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, broken)]
    assert [line["val/loss"] for line in lines[0]] == [line["val/loss"] for line in lines[1]]


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        (("averaging=ema", "averaging.decay=1.0"), r"averaging\.decay=1\.0"),
        (("averaging=last", "averaging.count=1"), r"averaging\.count=1"),
        (("averaging=ema", "averaging.start=8"), r"averaging\.start=8: .*update 9 of a run of 8"),
        (("averaging=last", "averaging.every=9"), r"averaging\.every=9: .*update 9 of a run of 8"),
        (("averaging=window", "averaging.start=8"), r"averaging\.start=8: .*update 9 of a run of 8"),
        (("averaging=window",), r"averaging\.start=\?\?\?: a value is needed"),
        (("averaging=ema", "trainer=deepspeed"), "sharded weights are not averaged"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_training(composed, tiny, settings, answer):
    overrides = [t for t in tiny if "trainer=deepspeed" not in settings or not t.startswith("trainer=")]
    with pytest.raises(ConfigError, match=answer):
        check(composed(*overrides, *settings))
