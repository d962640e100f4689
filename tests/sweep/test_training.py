"""Tests of sweeps of real training and of their reports."""

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from catalogue import CONF
from wandb_server import StandIn

from llm.commands.arguments import parse_command_line
from llm.commands.multirun import run_sweep
from llm.config.check import check
from llm.report.report_folder import write_report
from llm.sweep.manifest import read_sweep
from llm.training.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SHORT = ("max_steps=20", "val_every=20", "checkpoint_every=20", "callbacks.samples=null", "logger=csv")


@pytest.fixture
def sweep(tiny, tmp_path, monkeypatch):
    """Return a function that runs a sweep in this process, in a folder of the given name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def call(name, *arguments):
        whole = [*tiny, *SHORT, *arguments, f"hydra.sweep.dir={tmp_path}/{name}", "sweep.isolate=false"]
        assert run_sweep(parse_command_line(["-m", *whole], "train"), task=train, check=check) == 0
        return tmp_path / name

    return call


def test_one_optimizer_under_two_names_is_no_difference_and_a_tenfold_wrong_rate_is_worse(sweep, tmp_path):
    seeds, rate = "seed=1,2,3", "optimizer.lr=2e-3"
    lion = sweep("lion", seeds, rate, "optimizer=lion", "optimizer.betas=[0.95,0.95]", "optimizer.weight_decay=0")
    # min_rms=1 turns Tiger's relative rates into absolute ones; only gains differ, with half of Lion's rate
    tiger = sweep("tiger", seeds, rate, "optimizer=tiger", "optimizer.beta=0.95", "optimizer.min_rms=1",
                  "optimizer.weight_decay=0")  # fmt: skip
    text = write_report([lion, tiger], out=tmp_path / "same").text
    assert "no difference seen" in text
    assert "better" not in text
    text = write_report([sweep("adamw", seeds, "optimizer.lr=4e-3,4e-4")], out=tmp_path / "rates").text
    assert "lr=0.004 against lr=0.0004: better" in text
    assert "3 and 3 seeds" in text


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"].hex(), row.get("val/loss")) for row in rows]


def test_a_job_that_was_killed_resumes_to_the_losses_of_an_uninterrupted_one(tiny, tmp_path):
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
    reasons = [job.reason for job in read_sweep(tmp_path / "disturbed").jobs]
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
    assert exact[0] == exact[1]  # all columns except times


@pytest.fixture
def wandb_server():
    with StandIn() as server:
        yield server


def ranks_seen(process):
    """Watch a sweep until it ends. Return the process groups and commands of the ranks of each job by its leader.

    A fork that is about to start another program (git, W&B) has its parent's command for a moment and is no rank.
    """
    seen, looks = {}, collections.Counter()
    while process.poll() is None:
        for job in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                for member in [job, *job.children(recursive=True)]:
                    if any("hydra.run.dir=" in word for word in member.cmdline()):
                        seen.setdefault(job.pid, {})[member.pid] = (os.getpgid(member.pid), member.cmdline())
                        looks[member.pid] += 1
        time.sleep(0.1)
    return {leader: [found for pid, found in ranks.items() if looks[pid] >= 20] for leader, ranks in seen.items()}


def test_jobs_of_two_ranks_are_one_job_each_and_end_early_together(tiny, tmp_path, wandb_server):
    """Each job has two CPU ranks and is one W&B run. The second job has a far too low learning rate and is pruned."""
    jobs = [a for a in tiny if a != "trainer=cpu" and not a.startswith("max_steps")]
    jobs += ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "micro_batch_size=2", "max_steps=400"]
    jobs += ["val_every=40", "checkpoint_every=400", "callbacks.samples=null", "logger=wandb"]
    jobs += ["optimizer.lr=4e-3,1e-8", f"hydra.sweep.dir={tmp_path}/sweep"]
    start = [sys.executable, str(CONF.parent / "train.py"), "-m", *jobs, "sweep.prune=median", "sweep.prune_others=1"]
    reach = {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": wandb_server.url, "HOME": str(tmp_path / "sweep")}
    with open(tmp_path / "out.txt", "w+") as out:
        process = subprocess.Popen(start, cwd=tmp_path, stdout=out, stderr=out, env=os.environ | reach)
        seen = ranks_seen(process)
        out.seek(0)
        assert process.returncode == 0, out.read()
    first, second = read_sweep(tmp_path / "sweep").jobs
    assert (first.state, second.state) == ("finished", "pruned")
    assert second.reason.startswith("val/loss ")
    folders = [tmp_path / "sweep" / job.folder for job in (first, second)]
    reached = [max(path.name for path in folder.glob("checkpoints/step-*")) for folder in folders]
    assert reached[0] == "step-00000400"
    assert "step-00000100" < reached[1] < "step-00000400"  # the pruned job saved a checkpoint
    assert len(seen) == 2
    for leader, ranks in seen.items():
        assert len(ranks) == 3  # the job itself, and two ranks
        assert {group for group, _ in ranks} == {leader}
        assert not any("-m" in command[1:] for _, command in ranks)
    assert {path.name for path in tmp_path.iterdir()} == {"sweep", "out.txt"}
    assert len(list(tmp_path.glob("sweep/*/summary.json"))) == 2
    ids = [(folder / "wandb_run_id.txt").read_text().strip() for folder in folders]
    assert list(wandb_server.runs) == ids  # one per job for any number of ranks
    runs = [wandb_server.runs[run] for run in ids]
    assert [(run["groupName"], run["jobType"]) for run in runs] == [("sweep", "sweep")] * 2
    assert [run["tags"] for run in runs] == [["optimizer.lr=0.004"], ["optimizer.lr=1e-08"]]
    assert {row["tokens_seen"] for row in wandb_server.history(ids[0])} == {256 * step for step in range(1, 401)}
    assert ids[1] in wandb_server.exit_codes
