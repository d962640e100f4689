"""Limits of the operating system, processes that cannot be ended, and closed streams."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from llm.errors import ConfigError, LimitError
from llm.training import limits
from llm.training.train import train

ROOT = Path(__file__).parents[2]

HANGS = """
import os, signal, sys, threading, time
from llm.training.forced_exit import ended_by_second_signal
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)  # a run that ignores what it is sent
with ended_by_second_signal(grace_seconds=0.1):
    print("hangs", flush=True)
    while True:
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_second_signal_ends_a_process_that_hangs(number):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", HANGS], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "hangs\n"
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    finally:
        process.kill()


def test_too_few_open_files_for_data_workers_are_refused_with_the_limit(monkeypatch):
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (40, 40))
    with pytest.raises(ConfigError, match=r"loader\.num_workers=2: .* the limit is 40 .*ulimit -n 1024"):
        limits.check_open_files(2)
    limits.check_open_files(0)


def test_a_soft_limit_of_open_files_is_raised_as_far_as_workers_need(monkeypatch):
    raised = []
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (40, 4096))
    monkeypatch.setattr(limits.resource, "setrlimit", lambda _, pair: raised.append(pair))
    limits.check_open_files(2)
    assert raised == [(112, 4096)]


def test_exhausted_descriptors_are_one_line_with_the_limit():
    error = OSError(24, "Too many open files")
    found = limits.limit_error(error, killed_workers=[], micro_batch_tokens=1)
    assert f"the limit of {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} is reached" in str(found)
    assert limits.limit_error(RuntimeError("another"), killed_workers=[], micro_batch_tokens=1) is None


def test_exhausted_descriptors_are_recognized_from_any_error():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(number) for number in os.listdir("/dev/fd")}
    limit = [number for number in range(soft) if number not in used][4]  # four numbers below the limit are free
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        found = limits.limit_error(RuntimeError("received 0 items"), killed_workers=[], micro_batch_tokens=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert f"the limit of {limit} is reached" in str(found)


def test_a_full_shared_memory_is_named(monkeypatch):
    usage = namedtuple("usage", "total used free")(100, 100, 0)
    monkeypatch.setattr(limits.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"loader\.num_workers=2: .*/dev/shm, which has 0 bytes"):
        limits.check_shared_memory(2, micro_batch_tokens=256)
    limits.check_shared_memory(0, micro_batch_tokens=256)
    found = limits.limit_error(RuntimeError("bus"), killed_workers=["SIGBUS"], micro_batch_tokens=256)
    assert "/dev/shm: full, with 0 bytes free" in str(found)


def test_a_killed_data_worker_is_one_line_and_the_status_names_it(composed, tiny, tmp_path, monkeypatch):
    from data.data_module import TokenDataModule
    from llm.callbacks.recorder import Recorder

    loaders = []
    make = TokenDataModule._loader

    def keep(self, split, batches):
        loaders.append(make(self, split, batches))
        return loaders[-1]

    def kill(self, trainer, *_):
        if trainer.global_step == 2:
            for worker in loaders[0].workers:
                os.kill(worker.pid, signal.SIGKILL)

    monkeypatch.setattr(TokenDataModule, "_loader", keep)
    monkeypatch.setattr(Recorder, "on_train_batch_start", kill, raising=False)
    with pytest.raises(LimitError, match=r"a data worker was ended by SIGKILL from outside; .* resume"):
        train(
            composed(*tiny, "max_steps=400", "val_every=400", "checkpoint_every=400", "loader.num_workers=1"), tmp_path
        )
    assert json.loads((tmp_path / "summary.json").read_text())["status"].startswith("failed")


def test_closed_streams_are_opened_before_any_file(tmp_path):
    code = (
        "import sys, llm.commands\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "assert file.fileno() > 2, file.fileno()\n"
        "print('lost'); print('lost', file=sys.stderr); assert sys.stdin.read() == ''\n"
        "file.write('kept')\n"
    )
    command = f'exec "{sys.executable}" -c "$CODE" <&- >&- 2>&-'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CODE": code}
    assert subprocess.run(["bash", "-c", command], env=environment, check=False).returncode == 0
    assert (tmp_path / "file").read_text() == "kept"


def test_progress_without_a_standard_output_prints_nothing(composed, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    train(composed(*tiny, "max_steps=1", "val_every=1", "callbacks.samples=null"), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"
