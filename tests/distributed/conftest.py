import json
import shutil
import sys
from pathlib import Path

import pytest

from llm.distributed.launch import start_processes
from llm.training.train import train

WORKER = Path(__file__).with_name("rank_worker.py")
TINY = (
    "micro_batch_size=2", "batch_tokens=256", "max_steps=4", "val_every=4", "checkpoint_every=2",
    "callbacks.checkpoints.keep=9", "callbacks.progress=null", "callbacks.rank_checksum.every=3",
    "callbacks.samples.max_new_tokens=2", "trainer.gradient_clip_val=0.5", "loader.val_tokens=64",
)  # fmt: skip
ZERO = ("trainer=deepspeed", "trainer.accelerator=cpu", "trainer.persistence_threshold=64")
DDP = ("trainer=ddp", "trainer.accelerator=cpu")


REPLACED = {"trainer", *(setting.split("=")[0] for setting in TINY)}


class Runs:
    """Runs of one module's tests: on one process here, and on two ranks in sessions of their own."""

    def __init__(self, composed, tiny, out):
        self.composed, self.out = composed, out
        self.base = [t for t in tiny if t.split("=")[0] not in REPLACED]
        self.jobs = []

    def config(self, *overrides):
        chooses_data = any(o.startswith("data=") for o in overrides)
        base = [t for t in self.base if not (chooses_data and t.startswith(("data=", "data.")))]
        return self.composed(*base, *TINY, *overrides)

    def alone(self, name, *overrides, resume=False):
        """Train in this process; return the run folder."""
        folder = self.out / name
        folder.mkdir(exist_ok=True)
        train({**self.config("trainer=cpu", *overrides), "resume": str(folder) if resume else None}, folder)
        return folder

    def plan(self, name, *overrides, resume=False, strategy=ZERO, **options):
        """Note a run for two ranks; return the run folder."""
        folder = self.out / name
        # the environment of this process says one device: the ranks find two
        config = {**self.config(*strategy, *overrides), "resume": str(folder) if resume else None}
        self.jobs.append({"folder": str(folder), "config": config, **options})
        return folder

    def launch(self):
        """Train what was noted, all in one session of two ranks."""
        jobs, self.jobs = self.jobs, []
        path = self.out / "jobs.json"
        path.write_text(json.dumps(jobs))
        assert start_processes([sys.executable, str(WORKER), str(path)], processes=2) == 0

    def as_killed_after(self, step, source, name):
        """Copy a run as it would stand, had it been killed after a checkpoint."""
        folder = self.out / name
        shutil.copytree(source, folder, symlinks=True)
        for checkpoint in (folder / "checkpoints").glob("step-*"):
            if int(checkpoint.name.removeprefix("step-")) > step:
                shutil.rmtree(checkpoint)
        for link in ("last", "best"):
            (folder / "checkpoints" / link).unlink(missing_ok=True)
        return folder


@pytest.fixture(scope="session")
def ddp():
    """What a run is planned with to train under DDP instead."""
    return {"strategy": DDP}


@pytest.fixture(scope="module")
def runs(composed, tiny, tmp_path_factory):
    return Runs(composed, tiny, tmp_path_factory.mktemp("zero"))
