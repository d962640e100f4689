"""Tests that a sweep whose every job would be refused does not start."""

import pytest
from needed import needs

from llm.commands.arguments import parse_command_line
from llm.commands.multirun import run_sweep
from llm.commands.sweep_ahead import look_ahead, refuse_if_all_jobs_fail
from llm.config.check import check
from llm.errors import ConfigError
from llm.sweep.manifest import SweepJob

LINE = parse_command_line([], "train")


def jobs(*overrides):
    return [SweepJob(overrides=tuple(each.split())) for each in overrides]


def test_a_setting_that_every_job_refuses_is_reported_before_the_first_job(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    arguments = [*tiny, "model.num_heads=5", "seed=1,2,3", f"hydra.sweep.dir={tmp_path}/sweep"]
    with pytest.raises(ConfigError, match=r"model\.num_heads=5") as caught:
        run_sweep(parse_command_line(["-m", *arguments], "train"), task=lambda cfg, path: None, check=check)
    assert str(caught.value).count("num_heads=5") == 1  # once, and not per job
    assert not (tmp_path / "sweep").exists()


def test_jobs_that_are_refused_for_different_values_are_reported_together():
    with pytest.raises(ConfigError, match=r"(?s)optimizer\.lr=-1: .*optimizer\.lr=-2: "):
        refuse_if_all_jobs_fail(jobs("optimizer.lr=-1", "optimizer.lr=-2"), LINE, check)
    each = jobs(*(f"optimizer.lr=-{n}" for n in range(1, 12)))
    with pytest.raises(ConfigError, match="every job is refused"):
        refuse_if_all_jobs_fail(each, LINE, check)


def test_a_sweep_with_one_valid_job_starts_and_checks_no_further_job():
    seen = []

    def count(cfg):
        seen.append(cfg["seed"])
        check(cfg)

    three = jobs("seed=1 optimizer.lr=-1", "seed=2 optimizer.lr=0.1", "seed=3 optimizer.lr=0.1")
    refuse_if_all_jobs_fail(three, LINE, count)
    assert seen == [1, 2]


SEARCH = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "optimizer.lr=tag(log,interval(1e-4,1e-1))")


@needs("hydra-optuna-sweeper")
@pytest.mark.parametrize(
    "refused", [("model.num_heads=5",), ("model.num_heads=choice(2,4)", "seed=range(0,3)", "batch_tokens=7")]
)
def test_a_setting_that_every_trial_of_a_search_refuses_is_reported_before_the_first(
    tiny, tmp_path, monkeypatch, refused
):
    monkeypatch.setattr("sys.argv", ["train.py"])
    arguments = ["-m", *tiny, *SEARCH, *refused, f"hydra.sweep.dir={tmp_path}/sweep"]
    with pytest.raises(ConfigError, match=refused[-1].replace(".", r"\.")) as caught:
        run_sweep(parse_command_line(arguments, "train"), task=lambda cfg, path: None, check=check)
    assert str(caught.value).count(refused[-1]) == 1
    assert not (tmp_path / "sweep").exists()


@needs("hydra-optuna-sweeper")
def test_a_search_whose_ends_alone_are_refused_may_start(tiny):
    line = parse_command_line(["-m", *tiny, *SEARCH[:2], "optimizer.lr=interval(-1,1)", "seed=choice(0,1)"], "train")
    samples = look_ahead(line).samples
    assert [job.overrides[-2:] for job in samples] == [
        ("optimizer.lr=-1.0", "seed=0"),
        ("optimizer.lr=0.0", "seed=1"),
        ("optimizer.lr=1.0", "seed=0"),
    ]
    refuse_if_all_jobs_fail(samples, LINE, check, are_samples=True)
    refuse_if_all_jobs_fail(samples[:2], LINE, check, are_samples=True)  # other values of this key may be accepted
