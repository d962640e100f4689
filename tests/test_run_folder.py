import contextlib
import errno
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm.config.safety import redact
from llm.errors import ConfigError
from llm.run_folder.folder import SUMMARY_KEYS, RunFolder
from llm.run_folder.metrics_file import MetricsFile
from llm.run_folder.provenance import config_hash, git_commit, versions

APPEND_UNTIL_KILLED = """
import sys
from llm.run_folder.folder import RunFolder
folder = RunFolder(sys.argv[1])
folder.claim(resume=True)
step = 0
while True:
    step += 1
    folder.append_metrics(step, {"train/loss": 1.0 / step})
    folder.append_metrics(step, {"val/loss": 2.0 / step})
    folder.update({"status": "running", "steps": step})
    if step == 20:
        print("running", flush=True)
"""


def test_a_folder_is_refused_while_another_process_writes_to_it(tmp_path):
    command = [sys.executable, "-c", APPEND_UNTIL_KILLED, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "running\n"
        with pytest.raises(ConfigError, match=f"process {process.pid} on"):
            RunFolder(tmp_path).claim(resume=True)
    finally:
        process.kill()
        process.wait()
    RunFolder(tmp_path).claim(resume=True)


def test_a_lock_is_stale_when_its_process_number_belongs_to_another_process(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim()
    lock = json.loads((tmp_path / "run.lock").read_text())
    (tmp_path / "run.lock").write_text(json.dumps(lock | {"pid": 1}))
    folder.claim(resume=True)
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_lock_of_another_host_is_valid_until_it_was_not_updated_for_long(tmp_path):
    RunFolder(tmp_path).claim()
    lock = tmp_path / "run.lock"
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": 0.0}))
    with pytest.raises(ConfigError, match=r"process 1 on elsewhere .* delete run\.lock"):
        RunFolder(tmp_path).claim(resume=True)
    long_ago = time.time() - 3600
    os.utime(lock, (long_ago, long_ago))
    RunFolder(tmp_path).claim(resume=True)


def test_a_folder_with_a_run_is_refused_unless_it_is_resumed(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim()
    folder.write_summary({"status": "finished"})
    folder.release()
    with pytest.raises(ConfigError, match=r"already has a run \(status 'finished'\).*resume="):
        RunFolder(tmp_path).claim()
    RunFolder(tmp_path).claim(resume=True)


def test_a_folder_with_only_a_checkpoint_counts_as_a_run(tmp_path):
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    with pytest.raises(ConfigError, match="it has step-00000010"):
        RunFolder(tmp_path).claim()


def test_a_folder_that_cannot_be_created_is_refused_with_its_name(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(ConfigError, match=r"run\.dir=.*file/run: cannot be written"):
        RunFolder(blocked / "run").claim()


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write to any folder")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(tmp_path).claim()


def test_claiming_a_folder_removes_incomplete_files_of_a_killed_run(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".tmp-step-00000010-99").mkdir(parents=True)
    (checkpoints / ".tmp-step-00000010-99" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-summary.json-99").write_text("{")
    RunFolder(tmp_path).claim()
    assert not list(checkpoints.iterdir())
    assert not (tmp_path / ".tmp-summary.json-99").exists()


def test_the_summary_always_has_every_key_and_an_update_keeps_the_other_values(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_summary({"status": "running", "parameters": 10})
    folder.update({"val/loss": torch.tensor(2.5), "mfu": float("nan")})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == set(SUMMARY_KEYS)
    assert (summary["status"], summary["parameters"], summary["val/loss"], summary["mfu"]) == ("running", 10, 2.5, None)


def test_two_writes_of_one_step_share_a_line(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics(1, {"train/loss": 4.0})
    folder.append_metrics(2, {"train/loss": 3.0, "lr/matrix": 0.1})
    folder.append_metrics(2, {"val/loss": 3.5})
    assert folder.read_metrics() == [
        {"step": 1, "train/loss": 4.0},
        {"step": 2, "train/loss": 3.0, "lr/matrix": 0.1, "val/loss": 3.5},
    ]


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics(1, {"train/loss": float("nan"), "grad_norm": torch.tensor(float("inf"))})
    assert folder.read_metrics() == [{"step": 1, "train/loss": None, "grad_norm": None}]


def test_a_resumed_run_keeps_the_lines_up_to_its_step(tmp_path):
    folder = RunFolder(tmp_path)
    for step in range(1, 6):
        folder.append_metrics(step, {"train/loss": float(step)})
    with open(folder.metrics_path, "a") as file:
        file.write('{"step": 6, "train/lo')
    again = RunFolder(tmp_path)
    again.truncate_metrics(3)
    again.append_metrics(4, {"train/loss": 40.0})
    assert [line["train/loss"] for line in again.read_metrics()] == [1.0, 2.0, 3.0, 40.0]


def test_after_a_kill_every_line_is_complete_and_the_summary_is_readable(tmp_path):
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", APPEND_UNTIL_KILLED, str(folder)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.05 * attempt)
        process.kill()
        process.wait()
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == list(range(1, len(lines) + 1))
        assert json.loads((folder / "summary.json").read_text())["steps"] >= len(lines) - 1


def test_a_rank_that_is_not_the_writer_writes_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run", is_writer=False)
    folder.claim()
    folder.update({"status": "running"})
    folder.append_metrics(1, {"train/loss": 1.0})
    folder.save_text("samples.txt", "x")
    folder.append_text("samples.txt", "x")
    folder.truncate_metrics(0)
    assert not (tmp_path / "run").exists()


def test_text_files_are_replaced_or_extended(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save_text("optimizer.txt", "first")
    folder.save_text("optimizer.txt", "second")
    folder.append_text("samples.txt", "a")
    folder.append_text("samples.txt", "b")
    assert (tmp_path / "optimizer.txt").read_text() == "second"
    assert (tmp_path / "samples.txt").read_text() == "ab"


def test_versions_include_the_packages_that_determine_a_result():
    found = versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert {"python", "lightning", "hydra", "numpy"} <= set(found)


def test_git_commit_is_a_hash_inside_a_checkout_and_none_outside(tmp_path):
    assert git_commit(tmp_path) is None
    environment = os.environ | {
        f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True, env=environment)
    assert len(git_commit(tmp_path)) == 40
    (tmp_path / "file").write_text("x")
    subprocess.run(["git", "-C", tmp_path, "add", "file"], check=True)
    assert git_commit(tmp_path).endswith("-dirty")


def test_secrets_are_redacted_and_token_counts_are_kept():
    settings = {
        "batch_tokens": 4096,
        "tokenizer": "bytes",
        "bos_token": "<s>",
        "hf_token": "hf_abc",
        "logger": {"api_key": "k", "key_size": 3, "url": "https://me:pw@host/x", "list": [{"password": "p"}]},
    }
    clean = redact(settings)
    assert "hf_abc" not in str(clean)
    assert clean["logger"] == {
        "api_key": "<redacted>",
        "key_size": 3,
        "url": "https://<redacted>@host/x",
        "list": [{"password": "<redacted>"}],
    }
    assert (clean["batch_tokens"], clean["tokenizer"]) == (4096, "bytes")


def test_the_config_hash_depends_on_settings_and_not_on_their_order():
    assert config_hash({"a": 1, "b": {"c": [2]}}) == config_hash({"b": {"c": [2]}, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def full_after(count):
    """Return a replacement of os.pwrite for a disk with space for `count` bytes."""
    write = os.pwrite

    def pwrite(file, content, offset):
        write(file, content[:count], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    return pwrite


@pytest.mark.parametrize("count", [0, 1, 9])
def test_lines_that_a_full_disk_refuses_are_written_later_and_none_is_partial(tmp_path, monkeypatch, caplog, count):
    folder = RunFolder(tmp_path)
    folder.append_metrics(1, {"train/loss": 1.0})
    with monkeypatch.context() as disk:
        disk.setattr(os, "pwrite", full_after(count))
        folder.append_metrics(1, {"val/loss": 1.5})
        folder.append_metrics(2, {"train/loss": 2.0})
        folder.append_metrics(2, {"val/loss": 2.5})
        assert all(json.loads(line) for line in folder.metrics_path.read_text().splitlines())
    folder.append_metrics(3, {"train/loss": 3.0})
    assert folder.read_metrics() == [
        {"step": 1, "train/loss": 1.0, "val/loss": 1.5},
        {"step": 2, "train/loss": 2.0, "val/loss": 2.5},
        {"step": 3, "train/loss": 3.0},
    ]
    assert caplog.text.count("the disk or quota is full") == 1


def test_a_full_disk_does_not_end_a_run_and_other_failures_do(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.update({"status": "running"})

    def fail(number):
        def sync(_):
            raise OSError(number, os.strerror(number))

        return sync

    monkeypatch.setattr(os, "fsync", fail(errno.ENOSPC))
    folder.update({"status": "finished"})
    folder.save_text("optimizer.txt", "x")
    assert folder.read_summary()["status"] == "running"
    assert not list(tmp_path.glob(".tmp-*"))
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        folder.update({"status": "finished"})


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=12))
def test_metrics_on_a_disk_that_is_full_at_any_moments_equal_those_on_a_disk_with_space(tmp_path_factory, writes):
    """Each write starts a new line or extends the newest one, with space or without. At the end there is space."""
    path = tmp_path_factory.mktemp("metrics")
    there, expected, step = MetricsFile(path / "there"), MetricsFile(path / "expected"), 0
    for number, (ahead, has_space) in enumerate([*writes, (1, True)]):
        step += ahead
        expected.append({"step": step, f"{number}": number})
        with pytest.MonkeyPatch.context() as disk:
            if not has_space:
                disk.setattr(os, "pwrite", full_after(3))
            with contextlib.suppress(OSError):
                there.append({"step": step, f"{number}": number})
    assert there.read() == expected.read()
