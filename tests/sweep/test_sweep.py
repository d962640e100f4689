"""Tests of sweeps of a stand-in for train.py: failed and killed jobs, resumption, signals."""

import json
import os
import signal
import time

import psutil
import pytest

from llm.errors import ConfigError
from llm.sweep.manifest import read_sweep


def starts(folder):
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def states(folder):
    manifest = read_sweep(folder)
    return {job.brief(manifest.swept): (job.state, job.reason) for job in manifest.jobs}


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


GRID = ("kind=good,fails,dies", "seed=1,2", "optimizer.lr=0.01")


def test_failed_and_killed_jobs_are_resumed_to_the_leaderboard_of_an_undisturbed_sweep(project, sweep):
    status, out, err = sweep(*GRID)
    (first,) = project.sweeps
    assert status == 1
    assert states(first) == {
        **{f"kind=good seed={s}": ("finished", "") for s in (1, 2)},
        **{f"kind=fails seed={s}": ("failed", "the answer is not 42") for s in (1, 2)},
        **{f"kind=dies seed={s}": ("failed", "killed by SIGKILL") for s in (1, 2)},
    }
    assert read_sweep(first).state == "failed"
    assert "2 of 6 jobs done, 4 failed" in err
    assert f"-m sweep.resume=multirun/{first.name}" in err
    assert err.count("the answer is not 42") == 2
    assert "6 runs: 4 failed, 2 finished" in out

    (project.path / "mended").touch()
    status, _, err = sweep(f"sweep.resume={first}")
    assert status == 0, err
    assert err == ""
    assert {state for state, _ in states(first).values()} == {"finished"}
    for job in read_sweep(first).jobs:
        is_first_try = "kind=good" in job.overrides
        assert job.attempts == (1 if is_first_try else 2)
        again = [start["argv"] for start in starts(first / job.folder)[1:]]
        assert again == ([] if is_first_try else [[f"resume='{first / job.folder}'"]])
        steps = [json.loads(line)["step"] for line in (first / job.folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == [*range(1, 11)]

    status, _, err = sweep(*GRID)  # the first sweep has finished, so this is a new one
    assert status == 0, err
    assert len(project.sweeps) == 2
    boards = [(folder / "report" / "leaderboard.csv").read_text() for folder in project.sweeps]
    assert boards[0] == boards[1]
    assert boards[0].count("\n") == 4


def test_the_same_command_again_resumes_the_unfinished_sweep(project, sweep):
    command = ("kind=good,fails", "sweep.report=false")
    assert sweep(*command)[0] == 1
    (project.path / "mended").touch()
    status, out, _ = sweep(*command)
    assert status == 0
    (folder,) = project.sweeps
    assert f"sweep folder multirun/{folder.name}, 1 of 2 jobs are done" in out
    assert sweep(*command, "optimizer.lr=0.02")[0] == 0  # another command is another sweep
    assert sweep(*command, "sweep.resume=null")[0] == 0
    assert len(project.sweeps) == 3


def test_a_job_without_a_checkpoint_starts_again_from_the_beginning(project, sweep):
    assert sweep("kind=nothing,good")[0] == 1
    (folder,) = project.sweeps
    assert states(folder)["kind=nothing"] == ("failed", "kind=nothing: cannot be; try good")
    sweep(f"sweep.resume={folder}")
    (job,) = [job for job in read_sweep(folder).jobs if job.state == "failed"]
    assert (job.attempts, job.reason) == (2, "kind=nothing: cannot be; try good")  # the errors of this attempt only
    assert "resume" not in " ".join(starts(folder / job.folder)[-1]["argv"])
    steps = [json.loads(line)["step"] for line in (folder / job.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1]


def test_each_job_is_a_plain_run_in_a_process_group_of_its_own(project, sweep):
    sweep("seed=1,2", "optimizer.lr=0.5")
    (folder,) = project.sweeps
    for job in read_sweep(folder).jobs:
        (start,) = starts(folder / job.folder)
        assert "-m" not in start["argv"]  # child ranks repeat the arguments
        assert start["argv"] == [*job.overrides, f"hydra.run.dir='{folder / job.folder}'"]
        assert start["group"]
        assert start["wandb"] == [folder.name, "sweep", next(o for o in job.overrides if o.startswith("seed"))]


def test_the_console_has_a_line_for_each_change_with_loss_and_time(project, sweep):
    _, out, _ = sweep("kind=good,fails", "sweep.line_every=0.3", "step_seconds=0.15")
    lines = [line for line in out.splitlines() if "/2  " in line]
    assert any("running  starting" in line or "running  step" in line for line in lines)
    assert any("running" in line and "/10" in line and "loss" in line and "left" in line for line in lines)
    assert any(line.startswith("  1/2  finished  val/loss 3.0000") and line.endswith("kind=good") for line in lines)
    assert any(line.startswith("  2/2  failed  the answer is not 42") for line in lines)


def test_a_sweep_that_receives_sigterm_saves_its_job_and_can_be_resumed(project, sweep):
    process = project.start("seed=1,2", "step_seconds=0.1")
    wait_for(lambda: list(project.path.glob("multirun/*/0_*/checkpoints/step-5/manifest.json")))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    (folder,) = project.sweeps
    assert states(folder) == {"seed=1": ("stopped", "SIGTERM"), "seed=2": ("pending", "")}
    assert read_sweep(folder).state == "stopped"
    assert f"0 of 2 jobs done, 0 failed; resume with -m sweep.resume=multirun/{folder.name}" in err
    status, _, err = sweep("seed=1,2", "step_seconds=0.1")
    assert status == 0, err
    assert [starts(folder / job.folder)[-1]["argv"][0][:6] for job in read_sweep(folder).jobs] == [
        "resume",
        "seed=2",
    ]


def test_the_jobs_of_a_killed_sweep_end_within_seconds(project, sweep):
    process = project.start("seed=1", "step_seconds=0.1")
    wait_for(lambda: list(project.path.glob("multirun/*/0_*/starts.jsonl")))
    (job,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    wait_for(lambda: not job.is_running() or job.status() == psutil.STATUS_ZOMBIE, seconds=5)
    (folder,) = project.sweeps
    assert sweep("seed=1", "step_seconds=0.1")[0] == 0
    assert project.sweeps == [folder]


def test_a_running_sweep_cannot_be_resumed_by_a_second_process(project, sweep):
    process = project.start("seed=1", "step_seconds=0.3")
    wait_for(lambda: list(project.path.glob("multirun/*/0_*/starts.jsonl")))
    (folder,) = project.sweeps
    with pytest.raises(ConfigError, match="another process runs this sweep"):
        sweep(f"sweep.resume={folder}")
    status, *_ = sweep("seed=1", "step_seconds=0.3")  # the same command then starts a new sweep
    process.communicate(timeout=60)
    assert (status, process.returncode) == (0, 0)
    assert len(project.sweeps) == 2


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["sweep.resme=x"], r"sweep\.resme=x: unknown key; did you mean resume\?"),
        (["sweep.isolate=7"], r"sweep\.isolate=7: must be bool"),
        (["sweep.line_every=0"], "must be above 0"),
        (["sweep.resume=nowhere"], r"has no manifest\.json"),
    ],
)
def test_invalid_settings_of_a_sweep_are_reported(project, sweep, arguments, answer):
    with pytest.raises(ConfigError, match=answer):
        sweep("seed=1,2", *arguments)
    assert not (project.path / "multirun").exists()


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["+extra=one,three"], "extra=three: no such option; choose one of one, two"),
        (["+extra=one,two", "extra.only_in_one=2"], "extra.only_in_one: unknown key; did you mean extra.only_in_two?"),
        (["seed=1,2", "sed=3"], "sed: unknown key; did you mean seed?"),
    ],
)
def test_a_mistake_in_any_option_of_a_sweep_is_reported_before_a_job_starts(project, sweep, arguments, answer):
    (project.path / "conf" / "extra").mkdir()
    for name in ("one", "two"):
        (project.path / "conf" / "extra" / f"{name}.yaml").write_text(f"only_in_{name}: 1\n")
    with pytest.raises(ConfigError, match=answer.replace("?", r"\?")):
        sweep(*arguments)
    assert not (project.path / "multirun").exists()
    assert sweep("+extra=one,two", "sweep.report=false")[0] == 0


def test_hydra_settings_of_the_jobs_reach_them_and_those_of_the_sweep_do_not(project, sweep):
    more = project.path / "more"
    (more / "extra").mkdir(parents=True)
    (more / "extra" / "mine.yaml").write_text("depth: 2\n")
    shared = ["hydra.job.chdir=true", "+hydra.job.env_set.FLAVOUR=sour", f"hydra.searchpath=[file://{more}]"]
    own = ["hydra.sweep.subdir=${hydra.job.override_dirname}", "hydra.job.config.override_dirname.kv_sep=-"]
    assert sweep("seed=1,2", "+extra=mine", *shared, *own)[0] == 0
    (folder,) = project.sweeps
    starts = [json.loads(path.read_text()) for path in sorted(folder.glob("*/starts.jsonl"))]
    assert len(starts) == 2
    for start in starts:
        assert all(setting in start["argv"] for setting in [*shared, "+extra=mine"])
        assert not any(argument.startswith("hydra.sweep") for argument in start["argv"])
    assert {path.parent.name for path in folder.glob("*/starts.jsonl")} == {"+extra-mine,seed-1", "+extra-mine,seed-2"}


def test_a_resumed_sweep_refuses_other_arguments(project, sweep):
    sweep("seed=1,2")
    (folder,) = project.sweeps
    with pytest.raises(ConfigError, match="resumes its own command, seed=1,2"):
        sweep(f"sweep.resume={folder}", "seed=3")
    with pytest.raises(ConfigError, match="has a sweep of another command"):
        sweep("seed=3", f"hydra.sweep.dir={folder}")


def test_a_sweep_folder_that_cannot_be_created_is_reported(project, sweep):
    (project.path / "file").touch()
    with pytest.raises(ConfigError, match="choose a folder with write permission"):
        sweep("seed=1", f"hydra.sweep.dir={project.path}/file/x")


def test_jobs_can_share_one_process_and_a_failing_job_does_not_end_it(project, sweep):
    seen = []

    def task(cfg, path):
        seen.append((os.getpid(), cfg["seed"]))
        if cfg["seed"] == 2:
            raise ValueError("two is too much")
        return float(cfg["seed"])

    project.task = task
    status, _, err = sweep("seed=1,2,3", "sweep.isolate=false", "sweep.report=false")
    assert status == 1
    assert seen == [(os.getpid(), seed) for seed in (1, 2, 3)]
    (folder,) = project.sweeps
    jobs = {job.overrides[0]: job for job in read_sweep(folder).jobs}
    assert (jobs["seed=1"].value, jobs["seed=3"].value) == (1.0, 3.0)
    assert (jobs["seed=2"].state, jobs["seed=2"].reason) == ("failed", "two is too much")
    assert "two is too much" in err
