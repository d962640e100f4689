import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest

from data.loader import ignore_stop_signals
from llm.callbacks.stop_signals import STOPPING, StopSignals
from llm.run_folder.checkpoint import find_last
from llm.run_folder.folder import RunFolder

TRAIN = """
import importlib.util, sys
import lightning as L
import torch
spec = importlib.util.spec_from_file_location("tiny", sys.argv[1])
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
from data.loader import ignore_stop_signals
from llm.callbacks.stop_signals import StopSignals
from llm.run_folder.folder import RunFolder

class Loud(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.is_global_zero:
            print("batch", flush=True)

workers, devices, seconds_a_step = int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
torch.set_num_threads(1)
folder = RunFolder(sys.argv[2])
options = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
options |= {"max_steps": 10_000, "checkpoint_every": 10_000, "val_every": 9_000, "extra": [Loud()]}
trainer = tiny.make_trainer(folder, **options)
if trainer.is_global_zero:
    folder.claim()
else:
    folder.is_writer = False
data = tiny.TinyData(4, workers)
loader = data.train_dataloader
data.train_dataloader = lambda: with_init(loader())
def with_init(made):
    made.worker_init_fn = ignore_stop_signals
    return made
trainer.fit(tiny.TinyModule(seconds_a_step=seconds_a_step), datamodule=data)
stop = next(c.signal for c in trainer.callbacks if isinstance(c, StopSignals))
folder.release()
sys.exit(0 if stop is None else 128 + stop)
"""


class Run:
    def __init__(self, folder: Path, *, workers: int = 0, devices: int = 1, seconds_a_step: float = 0.02) -> None:
        tiny = str(Path(__file__).with_name("conftest.py"))
        self.folder = folder
        script = folder.with_suffix(".py")
        script.write_text(TRAIN)
        arguments = [tiny, str(folder), str(workers), str(devices), str(seconds_a_step)]
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for _ in range(6):
            if self.process.stdout.readline() != "batch\n":
                os.killpg(self.process.pid, signal.SIGKILL)
                pytest.fail(self.process.stderr.read())

    def end(self) -> int:
        """Wait for the end, reading the output so that the run never waits for us."""
        try:
            self.out, self.err = self.process.communicate(timeout=60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode


class Kill(L.Callback):
    """Sends this process a signal inside a micro-step."""

    def __init__(self, number, at_step):
        self.number, self.at_step = number, at_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at_step and self.number is not None:
            os.kill(os.getpid(), self.number)
            self.number = None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1], ids=lambda s: s.name)
def test_a_signal_saves_a_checkpoint_between_updates_and_is_logged(folder, train, capfd, number):
    before = signal.getsignal(number)
    trainer = train(folder, max_steps=50, val_every=20, checkpoint_every=100, extra=[Kill(number, 6)])
    assert f"{number.name}: saving a checkpoint" in capfd.readouterr().err
    summary = folder.read_summary()
    assert summary["status"] == f"stopped: {number.name}"
    assert summary["val/loss"] is None  # no time was spent on validation
    assert find_last(folder.path).step == summary["steps"] == folder.read_metrics()[-1]["step"] == 7
    assert next(c.signal for c in trainer.callbacks if isinstance(c, StopSignals)) is number
    assert signal.getsignal(number) == before


def test_a_stop_where_validation_was_due_saves_first_and_validates_too(folder, train):
    order = []

    class Order(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            order.append("validation")

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            order.append(f"save {trainer.global_step}")

    kill = Kill(signal.SIGTERM, 7)
    train(folder, max_steps=50, val_every=8, checkpoint_every=100, extra=[kill, Order()])
    assert order == ["save 8", "validation"]
    assert folder.read_metrics()[-1].keys() >= {"train/loss", "val/loss"}


def test_a_signal_to_the_whole_group_with_loader_workers_still_saves(tmp_path):
    run = Run(tmp_path / "run", workers=2)
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.end() == 143, run.err
    assert find_last(tmp_path / "run").step > 0


def test_a_second_ctrl_c_leaves_at_once_and_the_status_tells(tmp_path):
    run = Run(tmp_path / "run", seconds_a_step=1.0)
    run.process.send_signal(signal.SIGINT)
    while "SIGINT: saving" not in run.process.stderr.readline():
        pass
    run.process.send_signal(signal.SIGINT)
    assert run.end() != 0
    assert RunFolder(tmp_path / "run").read_summary()["status"] == "stopped: SIGINT (at once)"


def test_a_signal_to_one_rank_stops_all_of_them(tmp_path):
    run = Run(tmp_path / "run", devices=2)
    children = subprocess.run(["pgrep", "-P", str(run.process.pid)], capture_output=True, text=True, check=False)
    rank_one = int(children.stdout.split()[0])
    os.kill(rank_one, signal.SIGTERM)
    assert run.end() == 143, run.err
    assert RunFolder(tmp_path / "run").read_summary()["status"] == "stopped: SIGTERM"
    assert find_last(tmp_path / "run").step > 0


def test_a_worker_outlives_what_stops_a_run():
    child = os.fork()
    if child == 0:
        try:
            ignore_stop_signals(0)
            for number in STOPPING:
                os.kill(os.getpid(), number)
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
