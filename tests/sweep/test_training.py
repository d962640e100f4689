"""Sweeps of real training, and what their reports say."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from catalogue import CONF

from llm.multirun import run_sweep
from llm.report.build import write_report
from llm.sweep.manifest import read_manifest
from llm.training import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SHORT = ("max_steps=20", "val_every=20", "checkpoint_every=20", "callbacks.samples=null", "logger=csv")


@pytest.fixture
def sweep(tiny, tmp_path, monkeypatch):
    """Sweep in this process into a folder of this name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def call(name, *arguments):
        whole = [*tiny, *SHORT, *arguments, f"hydra.sweep.dir={tmp_path}/{name}", "sweep.isolate=false"]
        assert run_sweep(whole, task=train, config_name="train", config_dir=CONF) == 0
        return tmp_path / name

    return call


def test_one_optimizer_under_two_names_is_no_difference_and_a_tenfold_wrong_rate_is_worse(sweep, tmp_path):
    seeds, rate = "seed=1,2,3", "optimizer.lr=2e-3"
    lion = sweep("lion", seeds, rate, "optimizer=lion", "optimizer.betas=[0.95,0.95]", "optimizer.weight_decay=0")
    # a size that counts as 1 makes Tiger's relative rates plain ones; gains alone move at half of Lion's rate
    tiger = sweep("tiger", seeds, rate, "optimizer=tiger", "optimizer.beta=0.95", "optimizer.min_rms=1",
                  "optimizer.weight_decay=0")  # fmt: skip
    told = write_report([lion, tiger], out=tmp_path / "same").text
    assert "no difference seen" in told
    assert "better" not in told
    told = write_report([sweep("adamw", seeds, "optimizer.lr=4e-3,4e-4")], out=tmp_path / "rates").text
    assert "lr=0.004 against lr=0.0004: better" in told
    assert "3 and 3 seeds" in told


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"].hex(), row.get("val/loss")) for row in rows]


def test_a_real_job_killed_halfway_goes_on_to_the_losses_of_an_undisturbed_one(tiny, tmp_path):
    script = str(CONF.parent / "train.py")
    jobs = [*tiny, "max_steps=60", "callbacks.samples=null", "seed=1", "optimizer.lr=4e-3,-1"]
    start = [sys.executable, script, "-m", *jobs, f"hydra.sweep.dir={tmp_path}/disturbed", "sweep.line_every=5"]
    process = subprocess.Popen(start, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline, is_killed = time.monotonic() + 600, False
    while process.poll() is None:
        assert time.monotonic() < deadline
        for lock in tmp_path.glob("disturbed/0_*/run.lock"):
            if not is_killed and list(lock.parent.glob("checkpoints/step-*/manifest.json")):
                os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
                is_killed = True
        time.sleep(0.02)
    out = process.communicate()[0]
    assert process.returncode == 1, out
    reasons = [job.reason for job in read_manifest(tmp_path / "disturbed").jobs]
    assert reasons == ["killed by SIGKILL", "optimizer.lr=-1: must be above 0; 4e-3 suits adamw at tiny"]
    for again in ([sys.executable, script, "-m", f"sweep.resume={tmp_path}/disturbed"],
                  [sys.executable, script, "-m", *jobs, f"hydra.sweep.dir={tmp_path}/calm"]):  # fmt: skip
        assert subprocess.run(again, cwd=tmp_path, capture_output=True, timeout=600, check=False).returncode == 1
    first, second = (next((tmp_path / name).glob("0_*")) for name in ("disturbed", "calm"))
    assert losses(first) == losses(second)
    boards = [
        (tmp_path / name / "report" / "leaderboard.csv").read_text().splitlines() for name in ("disturbed", "calm")
    ]
    exact = [[[line.split(",")[i] for i in (0, 1, 2, 3, 4, 5, 6, 7)] for line in board] for board in boards]
    assert exact[0] == exact[1]  # all but what is timed
