"""Tests of reports of sweeps that have not ended or have no finished job."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from llm.report.report_folder import write_report
from llm.sweep.manifest import Manifest, SweepJob
from llm.sweep.sweep_folder import LOCK

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "sweep"
    folder.mkdir()
    jobs = tuple(SweepJob(overrides=(f"seed={seed}",)) for seed in (1, 2, 3))
    Manifest(command=("seed=1,2,3",), jobs=jobs).write(folder)
    return folder


def begin(make_run, sweep, seed, **options):
    folder = make_run(f"sweep/{seed}_x", seed=seed, **options)
    checkpoint = folder / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 1}))
    SweepJob(overrides=(f"seed={seed}",), folder=folder.name, state="finished").write(sweep)


def test_pending_jobs_are_counted_while_their_sweep_runs(make_run, sweep):
    begin(make_run, sweep, 1)
    with FileLock(sweep / LOCK):
        report = write_report([sweep], refresh_seconds=5)
        assert report.is_open
    assert report.text.startswith("3 runs: 1 finished, 2 pending\n")
    data = json.loads(re.search(r'id="data">(.*?)</script>', report.page.read_text(), re.DOTALL).group(1))
    assert data["is_open"]
    assert sorted(data["states"]) == ["finished", "pending", "pending"]
    assert not write_report([sweep]).is_open  # no process runs the sweep any more


def test_a_report_of_a_sweep_without_a_started_job_is_written(sweep):
    with FileLock(sweep / LOCK):
        report = write_report([sweep])
    assert report.is_open
    assert report.text.startswith("3 runs: 3 pending")
    assert report.page.is_file()


def test_watching_continues_between_two_jobs_and_ends_with_the_sweep(make_run, sweep):
    begin(make_run, sweep, 1)
    lock = FileLock(sweep / LOCK)
    lock.acquire()
    watcher = subprocess.Popen([sys.executable, "-m", "llm.report", str(sweep), "--watch", "0.2"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE)  # fmt: skip
    page = str(sweep / "report" / "index.html")
    seen = 0
    while seen < 3:
        seen += watcher.stdout.readline().strip() == page
    lock.release()
    out, _ = watcher.communicate(timeout=30)
    assert watcher.returncode == 0
    assert "1 finished, 2 pending" in out
