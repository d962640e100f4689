"""Tests that no file which the project did not write is removed, replaced or adopted."""

import contextlib
import logging

import pytest
import torch

from llm.errors import ConfigError
from llm.report.report_folder import write_report
from llm.run_folder.checkpoint import find_last, save_checkpoint
from llm.run_folder.checkpoint_files import point, remove_checkpoint, step_folder
from llm.run_folder.folder import RunFolder
from llm.run_folder.ownership import HYDRA_NOTES, WRITTEN, discard_empty, remember_contents
from llm.training.train import train

NAMES = (
    *(name.replace("*", "1") for name in WRITTEN),
    *HYDRA_NOTES,
    ".tmp-notes",
    ".tmp-claim.txt",
    "train.log",
    "sub/old.log",
    "thesis.tex",
    "checkpoints/notes.txt",
    "checkpoints/last",
    "checkpoints/best/mine.txt",
    "job.json.bak",
)
"""Files of a user: each name that a run uses, and names beside them."""


@pytest.mark.parametrize("name", NAMES)
def test_a_new_run_never_changes_a_foreign_file_of_a_name_that_a_run_uses(tmp_path, foreign, name):
    foreign(tmp_path, [name])
    folder = RunFolder(tmp_path)
    with contextlib.suppress(ConfigError):
        folder.check_free(*HYDRA_NOTES)
        folder.claim()
        folder.update({"status": "running"})
        folder.append_metrics(1, {"train/loss": 1.0})
        for text in ("optimizer.txt", "plan.txt", "samples.txt"):
            folder.save_text(text, "x")
        state = {"w": torch.ones(2)}
        save_checkpoint(step_folder(folder.checkpoints, 1), model_state=state, training_state={}, manifest={"step": 1})
        point(folder.checkpoints / "last", step_folder(folder.checkpoints, 1))
        point(folder.checkpoints / "best", step_folder(folder.checkpoints, 1))
        assert find_last(tmp_path).step == 1
        folder.release()


def test_a_foreign_folder_with_the_name_of_a_checkpoint_is_renamed_and_not_removed(tmp_path):
    folder = step_folder(tmp_path, 1)
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    save_checkpoint(folder, model_state={"w": torch.ones(2)}, training_state={}, manifest={"step": 1})
    assert (tmp_path / "step-00000001.other-files-1/mine.txt").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.safetensors", "training.pt"]


def test_a_checkpoint_is_removed_without_foreign_files_in_its_folder(tmp_path, foreign):
    kept, foreign_folder = step_folder(tmp_path, 1), step_folder(tmp_path, 2)
    save_checkpoint(kept, model_state={"w": torch.ones(2)}, training_state={}, manifest={"step": 1})
    foreign(kept, ["notes.txt"])
    foreign(foreign_folder, ["model.safetensors"])
    remove_checkpoint(kept)
    remove_checkpoint(foreign_folder)
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]


def test_every_file_of_a_run_is_known_by_name(composed, tiny, tmp_path):
    """A name that is missing in WRITTEN would be replaced in a folder that belongs to the user."""
    train(composed(*tiny, "model=moe", "logger=tensorboard", "eval=[experts]", "max_steps=2", "val_every=1"), tmp_path)
    known = {path for pattern in WRITTEN for path in tmp_path.glob(pattern)}
    files = {path for path in tmp_path.rglob("*") if path.is_file() and "checkpoints" not in path.parts}
    assert {str(path.relative_to(tmp_path)) for path in files - known} == set()
    assert len(known) > 6


@pytest.mark.parametrize("names", [("train.log", "sub/old.log", "server.log"), HYDRA_NOTES[:1], ("thesis.tex",), ()])
def test_only_new_notes_of_a_run_that_did_not_start_are_removed(tmp_path, foreign, names):
    folder = tmp_path / "mylogs"
    folder.mkdir()
    foreign(folder, names)
    remember_contents(folder)
    for name in (*HYDRA_NOTES, "train.log", "train_rank1.log"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name not in names:
            path.write_text("new")
    discard_empty(folder)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == sorted(names)


def test_nothing_is_removed_from_a_folder_of_unknown_contents_or_with_other_new_files(tmp_path):
    for name in ("unknown", "other"):
        (tmp_path / name).mkdir()
        if name == "other":
            remember_contents(tmp_path / name)
        (tmp_path / name / "a.log").touch()
        (tmp_path / name / "result.txt").touch()
        discard_empty(tmp_path / name)
        assert (tmp_path / name / "a.log").exists()
    remember_contents(tmp_path / "new")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "a.log").touch()
    (tmp_path / "newer" / "checkpoints").mkdir()
    discard_empty(tmp_path / "newer")  # it has a later time stamp than the remembered name
    assert not (tmp_path / "newer").exists()


def test_a_folder_of_logs_survives_a_plan_and_a_mistake_in_the_data(train_here, tiny, tmp_path, foreign):
    foreign(tmp_path / "mylogs", ["server.log", "sub/old.log", "train.log"])
    before = (tmp_path / "mylogs/train.log").read_text()
    for arguments, expected in ((["plan=true"], 0), (["data.files=missing.txt"], 2)):
        status, _, err = train_here(*tiny, "hydra.run.dir=mylogs", *arguments)
        assert status == expected, err
        assert not (tmp_path / "mylogs/.hydra").exists()
        log = (tmp_path / "mylogs/train.log").read_text()
        assert log.startswith(before)
        (tmp_path / "mylogs/train.log").write_text(before)  # the run's own lines


def test_the_notes_of_an_earlier_run_survive_a_second_command_with_its_folder(train_here, tiny, tmp_path):
    run = [*tiny, "max_steps=1", "callbacks.samples=null", "hydra.run.dir=run"]
    assert train_here(*run)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    status, _, err = train_here(*run, "seed=5")
    assert status == 2
    assert "already has a run" in err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["index.html", "leaderboard.csv"])
def test_a_report_does_not_replace_a_foreign_page(tmp_path, foreign, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("seed: 1")
    foreign(tmp_path / "site", [name])
    with pytest.raises(ConfigError, match=f"{name}: not written by a report"):
        write_report([tmp_path / "run"], out=tmp_path / "site")
    write_report([tmp_path / "run"])
    write_report([tmp_path / "run"])  # its own report is replaced


def test_removing_a_folder_without_a_run_leaves_the_logs_of_the_program_open(tmp_path):
    """A program that calls `llm.compose` logs to files of its own, which logging.shutdown() would close."""
    folder, logger = tmp_path / "run", logging.getLogger()
    remember_contents(folder)
    folder.mkdir()
    own, of_run = logging.FileHandler(tmp_path / "mine.log"), logging.FileHandler(folder / "train.log")
    for handler in (own, of_run):
        logger.addHandler(handler)
    try:
        discard_empty(folder)
        assert not folder.exists()
        assert own in logger.handlers
        assert of_run not in logger.handlers
        assert own.stream is not None
        logger.warning("still here")
        assert "still here" in (tmp_path / "mine.log").read_text()
    finally:
        for handler in (own, of_run):
            logger.removeHandler(handler)
            handler.close()
