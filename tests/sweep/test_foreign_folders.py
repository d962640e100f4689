"""Tests that a sweep uses only folders that are new, empty or its own."""

import json

import pytest

from llm.errors import ConfigError
from llm.run_folder.folder import RunFolder
from llm.sweep.job_folder import claim_folder, clear_folder
from llm.sweep.manifest import read_sweep


def test_a_job_takes_the_next_free_folder_and_clears_only_its_own_files(tmp_path, foreign):
    foreign(tmp_path / "0_dense", ["thesis.tex", "summary.json", "job.json"])
    (tmp_path / "0_dense-2").write_text("a file")
    job = claim_folder(tmp_path, ("seed=1",), tmp_path / "0_dense")
    assert job.folder == "0_dense-3"
    assert claim_folder(tmp_path, ("seed=1",), tmp_path / "9_other") == job
    with pytest.raises(ConfigError, match=r"hydra\.sweep\.subdir: .*each job needs its own folder"):
        claim_folder(tmp_path, ("seed=2",), tmp_path)
    path = tmp_path / job.folder
    own = ["summary.json", "metrics.jsonl", "checkpoints/.tmp-step-00000010-7/model.safetensors", ".hydra/config.yaml"]
    for name in own:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")
    foreign(
        path, ["thesis.tex", ".tmp-notes", "figures/a.png", "checkpoints/notes.txt", "train.log", "data/summary.json"]
    )
    clear_folder(path)
    assert not any((path / name).exists() for name in own)
    assert (path / "job.json").exists()


def test_a_foreign_finished_run_is_not_reported_as_a_job(project, sweep, foreign):
    folder = project.path / "s"
    foreign(folder / "0_job-good", ["thesis.tex", "config.yaml", ".hydra/config.yaml"])
    RunFolder(folder / "0_job-good").write_summary({"status": "finished", "val/loss": 0.5})
    status, _, err = sweep("seed=1", "hydra.sweep.dir=s")
    assert status == 0, err
    (job,) = read_sweep(folder).jobs
    assert (folder / "report/leaderboard.csv").read_text().count("\n") == 2  # the header and the sweep's own job
    assert (job.folder, job.value) == ("0_job-good-2", pytest.approx(3.01))
    assert json.loads((folder / "0_job-good/summary.json").read_text())["val/loss"] == 0.5


@pytest.mark.parametrize("name", ["report/index.html", "multirun.yaml", ".sweep.lock", "manifest.json"])
def test_a_sweep_refuses_a_folder_with_a_foreign_file_that_it_would_replace(project, sweep, foreign, name):
    foreign(project.path / "s", [name])
    with pytest.raises(ConfigError, match="choose another folder"):
        sweep("seed=1", "hydra.sweep.dir=s")
    assert not (project.path / "s/0_job-good").exists()


def test_all_jobs_in_the_folder_of_the_sweep_are_refused(project, sweep, foreign):
    foreign(project.path / "s", ["thesis.tex"])
    with pytest.raises(ConfigError, match="each job needs its own folder"):
        sweep("seed=1", "hydra.sweep.dir=s", "hydra.sweep.subdir=.")
    assert [path.name for path in (project.path / "s").iterdir()] == ["thesis.tex"]


def test_jobs_in_one_process_write_hydras_notes_into_their_own_folder(project, sweep, foreign):
    foreign(project.path / "s/0_job-good", [".hydra/config.yaml", "train.log"])
    project.task = lambda cfg, path: 1.0
    assert sweep("seed=1", "hydra.sweep.dir=s", "sweep.isolate=false", "sweep.report=false")[0] == 0
    (job,) = read_sweep(project.path / "s").jobs
    assert job.folder == "0_job-good-2"
    assert (project.path / "s" / job.folder / ".hydra/hydra.yaml").is_file()
    assert "- seed=1" in (project.path / "s" / job.folder / ".hydra/overrides.yaml").read_text()
    assert (project.path / "s" / job.folder / "train.log").is_file()
