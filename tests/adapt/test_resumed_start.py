"""A run that resumes needs the weights that it began with only where they are frozen."""

import shutil

from llm.run_folder.checkpoint import load_model
from llm.training.train import train


def test_a_resumed_run_does_not_read_the_run_that_it_began_with(composed, tiny, tmp_path):
    names = ("max_steps", "val_every", "checkpoint_every")
    kept = [*(t for t in tiny if not t.startswith(names)), "callbacks.samples=null", "schedule=constant"]
    source, folder = tmp_path / "source", tmp_path / "run"
    train(composed(*kept, "max_steps=2", "val_every=2", "checkpoint_every=2"), source)
    given = (*kept, f"init_from={source}", "val_every=4", "checkpoint_every=2")
    whole = train(composed(*given, "max_steps=4"), tmp_path / "whole")
    train(composed(*given, "max_steps=2"), folder)
    shutil.rmtree(source)
    assert train(composed(*given, "max_steps=4", f"resume={folder}"), folder) == whole
    ours, theirs = (load_model(path / "checkpoints/last") for path in (folder, tmp_path / "whole"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
