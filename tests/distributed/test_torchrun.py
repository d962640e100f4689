"""The command of the README as a user gives it: two processes on a CPU, a mixture of experts, Muon, ZeRO."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_torchrun_trains_experts_with_muon_on_shards_in_one_folder(tiny, tmp_path):
    settings = [t for t in tiny if t.split("=")[0] not in ("trainer", "max_steps", "val_every", "checkpoint_every")]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(str(ROOT / "train.py"), "trainer=deepspeed", "trainer.stage=2", "optimizer=muon", "model=moe"),
        *("trainer.accelerator=cpu", "max_steps=4", "val_every=4", "checkpoint_every=4"),
    ]
    result = subprocess.run([*command, *settings], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 4
    assert summary["val/loss"] < 6
    assert (folder / "checkpoints/last/model.safetensors").is_file()
    assert result.stdout.count("run folder") == 2, "one rank speaks, at the start and at the end"
