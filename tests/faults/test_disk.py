"""Disks that are full, small or read-only."""

import contextlib
import errno
import subprocess
import threading
import time

import pytest

from llm.errors import CheckpointError
from llm.run_folder import checkpoint_files
from llm.training.train import train

SHORT = ("max_steps=8", "checkpoint_every=3", "val_every=8", "callbacks.samples=null")


def test_a_disk_that_fills_in_the_middle_of_a_run_stops_it_with_the_checkpoint_before(
    composed, tiny, tmp_path, monkeypatch
):
    real, calls = checkpoint_files._write_manifest, []

    def fill(temporary, manifest):
        calls.append(manifest["step"])
        if manifest["step"] == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(temporary, manifest)

    monkeypatch.setattr(checkpoint_files, "_write_manifest", fill)
    with pytest.raises(CheckpointError, match=r"step-00000006: the disk or quota is full, .* bytes needed"):
        train(composed(*tiny, *SHORT), tmp_path)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["last", "step-00000003"]
    monkeypatch.undo()
    train(composed(*tiny, *SHORT) | {"resume": str(tmp_path)}, tmp_path)
    assert (tmp_path / "checkpoints/step-00000008").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "answer"),
    [
        ("kept", "the file-size limit of this process is reached"),
        ("new", "cannot be written ([Errno 27] File too large)"),
    ],
)
def test_a_quota_that_a_checkpoint_or_the_tokens_do_not_fit_is_named(fault, steady, tmp_path, cache, answer):
    assert steady  # that run has left its tokens
    fault.file_limit = 20_000
    outcome = fault.run(*([f"loader.cache_dir={tmp_path}/cache"] if cache == "new" else []))
    assert outcome.status == 2, outcome.err
    assert answer in outcome.err
    assert outcome.leftovers == []


@pytest.fixture
def small_disk(fault, tmp_path):
    """Have the run folder on a disk of 3 MB."""
    fault.cwd = tmp_path / "small"
    fault.cwd.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", fault.cwd], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    yield fault.cwd
    subprocess.run(["umount", fault.cwd], check=True)


def fill(path):
    """Leave no room on the disk."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)


@pytest.mark.slow
def test_a_small_disk_that_fills_up_keeps_what_is_whole(fault, small_disk):
    outcome = fault.run("callbacks.checkpoints.keep=99")
    assert outcome.status == 2
    assert "the disk or quota is full" in outcome.err
    assert outcome.whole
    assert outcome.leftovers == []


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_between_two_checkpoints_costs_no_line(fault, small_disk):
    def meanwhile():
        while not fault.recorded() >= 20:
            time.sleep(0.01)
        fill(small_disk / "filler")
        time.sleep(3)
        (small_disk / "filler").unlink()

    watcher = threading.Thread(target=meanwhile, daemon=True)
    watcher.start()
    outcome = fault.run("max_steps=600", "checkpoint_every=600", "val_every=600")
    watcher.join(timeout=10)
    assert outcome.status == 0, outcome.err
    assert "the disk or quota is full and this file is incomplete" in outcome.said
    assert sorted(outcome.losses) == list(range(1, 601))
