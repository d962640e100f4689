import json
import os

import psutil
import pytest

from llm.errors import ConfigError
from llm.report.runs import RunReader, find_runs
from llm.run_folder.folder import RunFolder


def test_runs_are_found_below_a_folder_in_the_order_of_their_jobs(make_run, tmp_path):
    for number in (10, 2, 0):
        folder = make_run(f"sweep/{number}_x")
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "config.yaml").write_text("{}")
    assert [path.name for path in find_runs([tmp_path / "sweep"])] == ["0_x", "2_x", "10_x"]
    assert find_runs([tmp_path / "sweep/2_x"]) == [tmp_path / "sweep/2_x"]
    (tmp_path / "empty").mkdir()
    for wrong in ("empty", "nowhere"):
        with pytest.raises(ConfigError, match=wrong):
            find_runs([tmp_path / wrong])


@pytest.mark.parametrize(
    ("status", "state", "reason"),
    [
        ("finished", "finished", ""),
        ("failed: loss=nan: not finite", "failed", "loss=nan: not finite"),
        ("stopped: SIGTERM", "stopped", "SIGTERM"),
        ("running", "died", ""),  # no process writes to the folder
        (None, "pending", ""),
    ],
)
def test_the_state_of_a_run_is_read_from_its_status(make_run, status, state, reason):
    run = RunReader().read(make_run("run", status=status, steps=4))
    assert (run.state, run.reason) == (state, reason)
    assert run.loss == (2.0 if state == "finished" else None)
    assert run.progress == (1.0 if state == "finished" else 0.4)


def test_a_run_is_running_while_another_process_writes_to_it(make_run):
    folder = make_run("run", status="running")
    owner = {"pid": os.getppid(), "host": os.uname().nodename, "started": None}
    RunFolder(folder).claim(resume=True)
    lock = json.loads((folder / "run.lock").read_text())
    assert RunReader().read(folder).state == "died"  # the process itself does not count as another process
    (folder / "run.lock").write_text(json.dumps(lock | owner | {"started": psutil.Process(os.getppid()).create_time()}))
    assert RunReader().read(folder).state == "running"


def test_reading_again_finds_added_extended_and_rewritten_lines(make_run):
    folder = make_run("run", steps=3)
    path, reader = folder / "metrics.jsonl", RunReader()
    assert [line["step"] for line in reader.read(folder).lines] == [1, 2, 3]
    with open(path, "a") as file:
        file.write(
            '{"step": 4, "tokens_seen": 400, "train/loss": 1.0}\n{"step": 5, "tok'
        )  # the last line is incomplete
    assert [line["step"] for line in reader.read(folder).lines] == [1, 2, 3, 4]
    writer = RunFolder(folder)
    writer.truncate_metrics(2)
    for step in (3, 4):
        writer.append_metrics(step, {"tokens_seen": 100 * step, "train/loss": float(step)})
    writer.append_metrics(4, {"val/loss": 7.0})
    lines = reader.read(folder).lines
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["val/loss"] == 7.0
    assert lines == RunReader().read(folder).lines


def test_seconds_and_flops_come_from_the_lines_or_from_the_throughput(make_run):
    run = RunReader().read(make_run("old"))
    # 100 tokens per update at 50 tokens per second; 6 FLOPs per token and parameter with 1000 parameters
    assert [p.seconds for p in run.curve("train/loss")] == pytest.approx([2.0 * step for step in range(1, 11)])
    assert run.curve("train/loss")[-1].flops == 6 * 1000 * 1000
    stated = make_run("new", extra=lambda step: {"training_seconds": 3.0 * step}, summary={"flops_per_token": 10.0})
    last = RunReader().read(stated).curve("val/loss")[-1]
    assert (last.seconds, last.flops) == (30.0, 10.0 * 1000)


def test_a_corrupt_file_is_treated_as_missing(make_run):
    folder = make_run("run")
    (folder / "summary.json").write_text("{")
    (folder / "config.yaml").write_text("a: [")
    run = RunReader().read(folder)
    assert run.config == {}
    assert run.state == "pending"
