"""Disks that are full, small or read-only."""

import errno
import subprocess

import pytest

from llm import checkpoint_files
from llm.errors import CheckpointError
from llm.training import train

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
    ("cache", "answer"), [("kept", "disk or quota is full"), ("new", "cannot be written ([Errno 27] File too large)")]
)
def test_a_quota_that_a_checkpoint_or_the_tokens_do_not_fit_is_named(fault, steady, tmp_path, cache, answer):
    assert steady  # that run has left its tokens
    fault.file_limit = 20_000
    outcome = fault.run(*([f"loader.cache_dir={tmp_path}/cache"] if cache == "new" else []))
    assert outcome.status == 2, outcome.err
    assert answer in outcome.err
    assert outcome.leftovers == []


@pytest.mark.slow
def test_a_small_disk_that_fills_up_keeps_what_is_whole(fault, tmp_path):
    fault.cwd = tmp_path / "small"
    fault.cwd.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", fault.cwd], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        outcome = fault.run()
        assert outcome.status != 0
        assert "full" in outcome.err or "No space left" in outcome.err
        assert all(not path.name.startswith(".tmp-step") for path in fault.folder.rglob("*"))
    finally:
        subprocess.run(["umount", fault.cwd], check=True)
