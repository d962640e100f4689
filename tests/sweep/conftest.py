"""A project with a stand-in for train.py that takes a tenth of a second, because these tests are about processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
name: job-${kind}
kind: good
seed: 0
max_steps: 10
max_tokens: null
batch_tokens: 100
step_seconds: 0.0
optimizer: {lr: 0.1}
resume: null
hydra:
  run: {dir: "runs/${now:%H-%M-%S-%f}"}
  sweep: {dir: "multirun/${now:%Y-%m-%d_%H-%M-%S-%f}", subdir: "${hydra.job.num}_${name}"}
  job: {name: train, chdir: false}
"""

TRAIN = '''
"""A stand-in for train.py: ten steps whose loss is a function of (lr, seed), with a checkpoint after the fifth.

kind=fails raises and kind=dies kills itself after step 7, unless the folder of this file has a file `mended`.
"""
import json, math, os, signal, sys, time
from pathlib import Path

from llm.sweep.follow import follow_parent
from llm.run_folder.folder import RunFolder

follow_parent()
given = dict(a.split("=", 1) for a in sys.argv[1:])
is_resumed = "resume" in given
path = Path((given["resume"] if is_resumed else given["hydra.run.dir"]).strip("'"))
folder = RunFolder(path)
folder.claim(resume=is_resumed)
config = json.loads((path / "config.yaml").read_text()) if is_resumed else {
    "kind": given.get("kind", "good"), "seed": int(given.get("seed", 0)), "max_steps": 10, "batch_tokens": 100,
    "step_seconds": float(given.get("step_seconds", 0)), "optimizer": {"lr": float(given.get("optimizer.lr", 0.1))}}
(path / "config.yaml").write_text(json.dumps(config))
threads = os.environ.get("OMP_NUM_THREADS")
start = {"argv": sys.argv[1:], "began": time.time(), "threads": threads, "group": os.getpgrp() == os.getpid(),
         "wandb": [os.environ.get("WANDB_RUN_GROUP"), os.environ.get("WANDB_JOB_TYPE"), os.environ.get("WANDB_TAGS")]}
with open(path / "starts.jsonl", "a") as file:
    file.write(json.dumps(start) + "\\n")
stopped = []
signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
loss = 2 + math.log10(config["optimizer"]["lr"] / 0.01) ** 2 + 0.01 * config["seed"]
is_mended = (Path(__file__).parent / "mended").exists()
figures = {"parameters": 1000, "active_parameters": 1000, "optimizer_state_bytes": 8000}
folder.update(figures | {"status": "running"})
checkpoint = folder.checkpoints / "step-5" / "manifest.json"
first = 6 if is_resumed else 1
folder.truncate_metrics(first - 1)
for step in range(first, 11):
    time.sleep(config["step_seconds"])
    value = loss + 4 * (1 - step / 10)
    metrics = {"tokens_seen": 100 * step, "train/loss": value, "val/loss": value, "tokens_per_second": 50.0}
    folder.append_metrics(step, metrics)
    if step == 5:
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_text("{}")
    if stopped:
        folder.update({"status": "stopped: SIGTERM"})
        sys.exit(143)
    if step == 7 and config["kind"] == "fails" and not is_mended:
        folder.update({"status": "failed: the answer is not 42"})
        sys.exit("the answer is not 42")
    if step == 7 and config["kind"] == "dies" and not is_mended:
        os.kill(os.getpid(), signal.SIGKILL)
    if config["kind"] == "nothing":
        sys.exit("error: kind=nothing: cannot be; try good")
folder.update({"status": "finished", "val/loss": loss, "tokens_seen": 1000, "seconds": 1.0, "tokens_per_second": 50.0})
folder.release()
'''

SWEEP = """
import sys
from pathlib import Path
from llm.commands.arguments import parse_command_line
from llm.commands.multirun import run_sweep
from llm.errors import CrucibleError

def task(cfg, path):
    raise AssertionError("each job is a process of its own")

try:
    line = parse_command_line(sys.argv[1:], "train", Path(__file__).parent / "conf")
    sys.exit(run_sweep(line, task=task, check=dict))
except CrucibleError as error:
    sys.exit(f"error: {error}")
"""


class Project:
    """A folder with conf/ and train.py in which tests run sweeps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "conf").mkdir(parents=True)
        (path / "conf" / "train.yaml").write_text(CONFIG)
        shutil.copy(ROOT / "conf" / "sweep.yaml", path / "conf")
        (path / "train.py").write_text(TRAIN)
        (path / "sweep.py").write_text(SWEEP)
        self.environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        self.environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def start(self, *arguments: str, **options):
        """Start a sweep in a new process."""
        command = [sys.executable, str(self.path / "sweep.py"), "-m", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.path, env=self.environment, **pipes, **options)

    def sweep(self, *arguments: str, monkeypatch, capfd):
        """Run a sweep in this process and return (exit status, standard output, standard error)."""
        from llm.commands.arguments import parse_command_line
        from llm.commands.multirun import run_sweep

        monkeypatch.chdir(self.path)
        monkeypatch.setattr(sys, "argv", ["train.py"])
        monkeypatch.setenv("PYTHONPATH", self.environment["PYTHONPATH"])
        capfd.readouterr()
        line = parse_command_line(["-m", *arguments], "train", self.path / "conf")
        status = run_sweep(line, task=self.task, check=dict)
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    @staticmethod
    def task(cfg, path):
        """Run a job where jobs share a process."""
        raise AssertionError("each job is a process of its own")

    @property
    def sweeps(self) -> list[Path]:
        """The folders of all sweeps, oldest first."""
        return sorted((self.path / "multirun").iterdir())


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path / "project")


@pytest.fixture
def sweep(project, monkeypatch, capfd):
    """Return a function: `sweep("seed=1,2", …)` gives (exit status, standard output, standard error)."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as the command line does
    return lambda *arguments: project.sweep(*arguments, monkeypatch=monkeypatch, capfd=capfd)
