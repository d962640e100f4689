"""Tests of the rules that end jobs early, on their own and in sweeps of a stand-in for train.py."""

import json
import math
import re
import signal
import time

import pytest
import yaml
from needed import needs

from llm.errors import ConfigError
from llm.report.report_folder import write_report
from llm.sweep import job_process
from llm.sweep.manifest import SweepJob, read_sweep
from llm.sweep.prune import Pruner, Pruning, Validation, best_by

MEDIAN = Pruning(rule="median", after=0.25, factor=2, others=3)
HALVING = Pruning(rule="halving", after=0.125, factor=2, others=1)


@pytest.mark.parametrize(
    ("loss", "others", "is_pruned"),
    [
        (2.0, [1.0, 2.0, 3.0], False),  # equal to the median
        (2.1, [1.0, 2.0, 3.0], True),
        (9.0, [1.0, 2.0], False),  # too few other jobs
        (2.6, [1.0, 2.0, 3.0, 4.0], True),  # the median of an even number is the mean of the middle two
        (math.inf, [1.0, math.inf, math.inf], False),
        (math.inf, [1.0, 2.0, math.inf], True),
    ],
)
def test_the_median_rule_ends_a_job_strictly_above_the_median(loss, others, is_pruned):
    assert bool(MEDIAN.judge(loss, others)) is is_pruned


def test_halving_keeps_one_in_factor_jobs_and_judges_once_per_rung():
    eta4 = Pruning(rule="halving", after=0.0625, factor=4, others=3)
    assert [bool(eta4.judge(loss, [1.0, 2.0, 3.0])) for loss in (0.5, 1.5, 3.5)] == [False, True, True]
    assert [bool(eta4.judge(loss, [1, 2, 3, 4, 5, 6, 7])) for loss in (1.5, 2.5)] == [False, True]  # two of eight
    shares = [step / 20 for step in range(21)]
    asked = [step for step in range(1, 21) if HALVING.asks(shares[step - 1], shares[step])]
    assert asked == [3, 5, 10]  # at or after 1/8, at 1/4, at 1/2, and not at the end
    assert [step for step in range(1, 21) if eta4.asks(shares[step - 1], shares[step])] == [2, 5]


def test_losses_are_compared_at_the_same_tokens_whatever_the_batch():
    run = [Validation(1, 100, 3.0), Validation(2, 200, 2.0), Validation(3, 300, 2.5)]
    assert [best_by(run, tokens) for tokens in (50, 100, 299, 300, 301)] == [None, 3.0, 2.0, 2.0, None]


@pytest.fixture
def write_job(tmp_path):
    """Return a function that writes one job with these losses: `write_job("0", [3.0, 2.0], "seed=1")`."""

    def write(name, losses, *overrides, batch=100):
        job = SweepJob(overrides=(f"name={name}", *overrides), folder=name, state="running")
        (tmp_path / name).mkdir()
        job.write(tmp_path)
        lines = []
        for step in range(1, 2 * len(losses) + 1):
            line = {"step": step, "tokens_seen": step * batch, "train/loss": 9.0}
            lines.append(line | ({} if step % 2 else {"val/loss": losses[step // 2 - 1]}))
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / name / "config.yaml").write_text("max_steps: 10\n")
        return job

    return write


def test_a_job_is_compared_with_jobs_of_its_seed_that_reached_the_same_tokens(write_job, tmp_path):
    for number in range(3):
        write_job(f"good-{number}", [3.0, 2.0], "seed=1")
    write_job("early", [1.0], "seed=1")
    same, other = write_job("same", [9.0, 2.5], "seed=1"), write_job("other", [9.0, 2.5], "seed=2")
    # step 2 of 10 is before a quarter of the updates; at step 4 the loss of 2.5 is above three losses of 2.0
    why = "val/loss 2.5000 at 400 tokens is above 2.0000, the median of 3 others"
    assert Pruner(MEDIAN, tmp_path, same).look() == (2.5, why)
    assert Pruner(MEDIAN, tmp_path, other).look() is None
    watched = Pruner(MEDIAN, tmp_path, write_job("wide", [None], "seed=1", batch=200))
    assert watched.look() is None  # the first validation is before a quarter of the updates
    assert watched.look() is None  # each validation is judged once


def test_a_loss_that_is_not_finite_counts_as_infinite(write_job, tmp_path):
    for number in range(3):
        write_job(f"good-{number}", [3.0, 2.0])
    behind = Pruner(MEDIAN, tmp_path, write_job("nan", [None, None])).look()
    assert "val/loss inf at 400 tokens" in behind.why


RATES = ("optimizer.lr=0.01,0.02,0.03,1.0,0.011,10.0", "step_seconds=0.1", "sweep.prune=median")


@pytest.fixture
def quick(monkeypatch):
    """Check jobs more often, because they take half a second."""
    monkeypatch.setattr(job_process, "LOOK_EVERY", 0.02)


def states(folder):
    return {job.overrides[0].split("=")[1]: job.state for job in read_sweep(folder).jobs}


def test_pruned_jobs_end_early_and_the_sweep_still_succeeds(project, sweep, quick):
    status, out, err = sweep(*RATES)
    (folder,) = project.sweeps
    assert status == 0, err
    assert err == ""
    assert states(folder) == {"0.01": "finished", "0.02": "finished", "0.03": "finished", "1.0": "pruned",
                              "0.011": "finished", "10.0": "pruned"}  # fmt: skip
    manifest = read_sweep(folder)
    assert manifest.state == "finished"
    for job in manifest.jobs:
        steps = [json.loads(line)["step"] for line in (folder / job.folder / "metrics.jsonl").read_text().splitlines()]
        assert steps[-1] == 10 if job.state == "finished" else 3 <= steps[-1] < 10
        if job.state == "pruned":
            # step 3 is the first after a quarter, which all other jobs have reached
            assert re.fullmatch(
                r"val/loss \d+\.\d{4} at 300 tokens is above 4\.8\d+, the median of [35] others", job.reason
            )
            assert job.value == pytest.approx(4.8 + math.log10(float(job.overrides[0].split("=")[1]) / 0.01) ** 2)
    line = next(line for line in out.splitlines() if line.startswith("  4/6  pruned  val/loss "))
    assert line.endswith("optimizer.lr=1.0")
    assert "6 runs: 4 finished, 2 pruned" in out
    assert sweep(f"sweep.resume={folder}")[0] == 0  # every job is done
    assert {job.attempts for job in read_sweep(folder).jobs} == {1}


def test_a_stopped_sweep_leaves_its_jobs_unfinished_and_keeps_its_rule_when_resumed(project, sweep, quick):
    process = project.start(*RATES, "sweep.prune_others=2")
    deadline = time.monotonic() + 60
    while not list(project.path.glob("multirun/*/1_*/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    (folder,) = project.sweeps
    assert list(states(folder).values()) == ["finished", "stopped", *["pending"] * 4]
    assert read_sweep(folder).prune == {"rule": "median", "after": 0.25, "factor": 2, "others": 2}
    status, _, err = sweep(f"sweep.resume={folder}")
    assert status == 0, err
    assert states(folder)["10.0"] == "pruned"
    assert read_sweep(folder).prune["others"] == 2
    with pytest.raises(ConfigError, match=r"sweep\.prune=median: ends a job's process"):
        sweep(f"sweep.resume={folder}", "sweep.isolate=false")


def test_the_report_makes_no_claim_about_a_setting_with_pruned_seeds(project, sweep, quick):
    sweep("optimizer.lr=0.01,0.02,0.03,1.0", "seed=1,2", "step_seconds=0.1", "sweep.prune=halving")
    (folder,) = project.sweeps
    jobs = [job for job in read_sweep(folder).jobs if job.state == "pruned"]
    assert {job.overrides[0] for job in jobs} == {"optimizer.lr=1.0"}
    note = folder / next(job.folder for job in read_sweep(folder).jobs if "optimizer.lr=0.02" in job.overrides)
    for name, key, value in (("job.json", "state", "pruned"), ("summary.json", "status", "stopped: SIGTERM")):
        (note / name).write_text(json.dumps(json.loads((note / name).read_text()) | {key: value}))
    report = write_report([folder])
    assert "8 runs: 5 finished, 3 pruned" in report.text
    assert "1/2, 1 pruned" in report.text
    assert "lr=0.01 against lr=0.02: seeds pruned, no claim" in report.text
    assert "lr=0.01 against lr=0.03: better" in report.text


@needs("hydra-optuna-sweeper")
def test_a_pruned_optuna_trial_counts_with_its_last_loss_and_the_study_continues(project, sweep, quick):
    space = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=7", "hydra.sweeper.n_jobs=1", "step_seconds=0.1",
             "optimizer.lr=tag(log, interval(0.001, 10.0))", "sweep.prune=halving", "sweep.prune_others=2"]  # fmt: skip
    status, out, err = sweep(*space)
    (folder,) = project.sweeps
    jobs = read_sweep(folder).jobs
    assert status == 0, err
    assert len(jobs) == 7
    assert {job.state for job in jobs} == {"finished", "pruned"}, out
    best = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(job.value for job in jobs if job.state == "finished")


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["sweep.prune=medain"], r"sweep\.prune=medain: must be one of median \| halving or null"),
        (["sweep.prune=median", "sweep.prune_after=1.5"], "must be between 0 and 1"),
        (["sweep.prune=halving", "sweep.prune_factor=1"], "must be at least 2"),
        (["sweep.prune=halving", "sweep.prune_others=0"], "must be at least 1"),
        (["sweep.prune_after=0.5"], r"acts only with sweep\.prune=median or sweep\.prune=halving"),
        (["sweep.prune=median", "sweep.prune_factor=4"], r"prune_factor=4: acts only with sweep\.prune=halving"),
        (["sweep.prune=median", "sweep.isolate=false"], "all jobs share one"),
    ],
)
def test_invalid_pruning_settings_are_reported_before_any_job_starts(project, sweep, arguments, answer):
    with pytest.raises(ConfigError, match=answer):
        sweep("seed=1,2", *arguments)
    assert not (project.path / "multirun").exists()
