"""Tests of Hydra's launchers and sweepers with jobs of a sweep. Each needs its plugin, which the extra `sweep` has."""

import json

import yaml
from catalogue import CONF
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from needed import needs

from llm.commands.arguments import parse_command_line
from llm.commands.sweep_ahead import look_ahead
from llm.sweep.job_process import share
from llm.sweep.manifest import read_sweep


def starts(project):
    (folder,) = project.sweeps
    paths = sorted(folder.glob("*/starts.jsonl"))
    return [json.loads(path.read_text().splitlines()[0]) for path in paths]


@needs("hydra-joblib-launcher")
def test_joblib_runs_jobs_in_parallel_and_divides_the_threads(project, sweep, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    status, out, err = sweep("kind=good,dies", "step_seconds=0.3", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert status == 1, err
    assert "killed by SIGKILL" in out
    first, second = starts(project)
    assert abs(first["began"] - second["began"]) < 2  # each takes at least 2.1 s, so they overlap
    assert [first["threads"], second["threads"]] == ["4", "4"]


@needs("hydra-joblib-launcher")
def test_joblib_keeps_the_number_of_threads_that_the_user_set(project, sweep, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert sweep("seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")[0] == 0
    assert [start["threads"] for start in starts(project)] == ["3", "3"]


@needs("hydra-submitit-launcher")
def test_the_slurm_launcher_and_its_settings_compose():
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=8"]
        launcher = compose("train", overrides=chosen, return_hydra_config=True).hydra.launcher
    GlobalHydra.instance().clear()
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.partition, launcher.gpus_per_node) == ("gpu", 8)


@needs("hydra-submitit-launcher")
def test_the_local_submitit_launcher_runs_jobs_and_reports_failures(project, sweep):
    status, _, err = sweep("kind=good,fails", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=1")
    assert status == 1, err
    (folder,) = project.sweeps
    found = {job.overrides[0]: (job.state, job.reason) for job in read_sweep(folder).jobs}
    assert found == {"kind=good": ("finished", ""), "kind=fails": ("failed", "the answer is not 42")}


@needs("hydra-optuna-sweeper")
def test_an_optuna_study_continues_after_failed_trials_and_a_resumed_one_repeats_no_finished_trial(project, sweep):
    space = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=3"]
    space += ["optimizer.lr=tag(log, interval(0.001, 1.0))", "kind=choice(good, fails)"]
    status, out, err = sweep(*space)
    assert all("optimizer.lr=" in line and "kind=" in line for line in out.splitlines() if "  running  " in line)
    (folder,) = project.sweeps
    manifest = read_sweep(folder)
    states = [job.state for job in manifest.jobs]
    assert len(states) == 6
    assert set(states) == {"finished", "failed"}, err
    assert status == 1
    best = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(job.value for job in manifest.jobs if job.value is not None)
    (project.path / "mended").touch()
    assert sweep(*space)[0] == 0  # its sampler has a fixed seed and asks for the same trials again
    again = read_sweep(folder)
    assert len(again.jobs) >= 6
    kept = {job.key: job.attempts for job in again.jobs}
    assert all(kept[job.key] == 1 for job in manifest.jobs if job.state == "finished")


@needs("hydra-optuna-sweeper")
def test_an_optuna_study_in_which_every_trial_fails_ends_with_the_usual_summary(project, sweep):
    status, _, err = sweep("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "kind=choice(fails,nothing)")
    assert status == 1
    assert err.endswith(f"0 of 2 jobs done, 2 failed; resume with -m sweep.resume=multirun/{project.sweeps[0].name}\n")
    assert "Traceback" not in err


def test_the_jobs_of_a_grid_are_known_before_it_starts(project):
    arguments = ["-m", "seed=1,2", "optimizer.lr=0.1", "kind=a,b", "hydra.job.chdir=true", "hydra.sweep.dir=s"]
    ahead = look_ahead(parse_command_line(arguments, "train", project.path / "conf"))
    assert ahead.for_jobs == ("hydra.job.chdir=true",)
    assert ahead.swept == ("seed", "kind")
    assert [job.overrides for job in ahead.jobs] == [
        (f"seed={seed}", "optimizer.lr=0.1", f"kind={kind}") for seed in (1, 2) for kind in "ab"
    ]


def test_devices_are_divided_evenly_and_shared_where_there_are_too_few():
    assert [share(tuple("01234567"), slot, 4) for slot in range(4)] == [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7")]
    assert [share(tuple("012"), slot, 2) for slot in range(2)] == [("0",), ("1", "2")]
    assert [share(tuple("01"), slot, 3) for slot in range(3)] == [("0",), ("1",), ("0",)]
