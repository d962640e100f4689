import json
import time

import pytest
from rich.console import Console

from llm.sweep.job_progress import ProgressReader, last_line
from llm.sweep.manifest import Manifest, SweepJob, read_notes, read_sweep
from llm.sweep.monitor import Monitor


@pytest.fixture
def sweep(tmp_path):
    jobs = [
        SweepJob(overrides=("a=1", "seed=1"), folder="0", state="finished", value=1.25, seconds=61.0),
        SweepJob(overrides=("a=1", "seed=2"), folder="1", state="running", attempts=1),
        SweepJob(overrides=("a=1", "seed=[3]"), folder="2", state="failed", reason="killed by SIGKILL", seconds=2.0),
    ]
    for job in jobs:
        (tmp_path / job.folder).mkdir()
        job.write(tmp_path)
    jobs = (*jobs, SweepJob(overrides=("a=1", "seed=4")))
    manifest = Manifest(command=("a=1", "seed=1,2,[3],4"), jobs=jobs, swept=("seed",))
    manifest.write(tmp_path)
    return tmp_path


def write_run(folder, *, steps, total=10):
    (folder / "config.yaml").write_text(f"max_steps: {total}\nmax_tokens: null\nbatch_tokens: 4\n")
    lines = [json.dumps({"step": step, "train/loss": 5.0 - step}) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99, "trai')


def test_a_terminal_shows_one_line_per_job_with_state_step_loss_and_time(sweep):
    write_run(sweep / "1", steps=3)
    monitor = Monitor(sweep, read_sweep(sweep), line_every=1.0)
    monitor._table()  # the first call starts the clock of each job
    time.sleep(0.05)
    write_run(sweep / "1", steps=4)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(monitor._table())
    shown = console.export_text().splitlines()
    for line, parts in zip(
        shown[1:],
        [
            ("finished", "val/loss 1.2500", "1 min 1 s", "seed=1"),
            ("running", "step 4/10", "loss 1.0000", "left", "seed=2"),
            ("failed", "killed by SIGKILL", "2 s", "seed=[3]"),
            ("pending", "seed=4"),
        ],
        strict=True,
    ):
        assert all(part in line for part in parts), line
        assert "a=1" not in line  # an override that all jobs share is not shown


def test_the_remaining_time_is_estimated_from_the_observed_speed(tmp_path, monkeypatch):
    reader = ProgressReader()
    monkeypatch.setattr("llm.sweep.job_progress.time.monotonic", lambda: clock)
    clock = 100.0
    assert reader.read(tmp_path) is None
    write_run(tmp_path, steps=2)
    assert reader.read(tmp_path) == (2, 10, 3.0, None)
    clock = 106.0
    write_run(tmp_path, steps=4)
    assert reader.read(tmp_path) == (4, 10, 1.0, 18.0)  # two steps took 6 seconds, and six are left


def test_the_last_complete_line_is_found_before_an_incomplete_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_line(path) is None
    path.write_text('{"step": 1}\n{"step": 2, "x": 1}\n{"ste')
    assert last_line(path) == {"step": 2, "x": 1}


def test_job_notes_that_cannot_be_read_are_skipped(sweep):
    (sweep / "3").mkdir()
    (sweep / "3" / "job.json").write_text("{")
    assert [note.folder for note in read_notes(sweep)] == ["0", "1", "2"]
    assert [job.state for job in read_sweep(sweep).jobs] == ["finished", "running", "failed", "pending"]
