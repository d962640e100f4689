"""Tests that every combination of loggers is built and writes."""

import itertools
import json

import pytest
from catalogue import CONF
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from llm.config.build import build_loggers
from llm.config.files import load, save
from llm.run_folder.folder import RunFolder

NAMES = sorted(file.stem for file in (CONF / "logger").glob("*.yaml"))
TYPES = {"csv": CSVLogger, "tensorboard": TensorBoardLogger, "wandb": WandbLogger}


@pytest.mark.parametrize("names", [pair for n in (0, 1, 2, 3) for pair in itertools.combinations(NAMES, n)])
def test_each_chosen_logger_is_built(composed, tmp_path, names):
    cfg = composed(f"logger=[{','.join(names)}]", *(["logger.wandb.mode=disabled"] if "wandb" in names else []))
    loggers = build_loggers(cfg, run_folder=RunFolder(tmp_path), name="n", config=cfg, describe=dict)
    assert len(loggers) == len(names)
    assert all(any(isinstance(logger, TYPES[name]) for logger in loggers) for name in names)


def test_two_loggers_both_write(tiny, train_here, tmp_path):
    status, output, _ = train_here(*tiny, "max_steps=2", "logger=[csv,tensorboard]", "hydra.run.dir=run")
    assert status == 0, output
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert "train/loss" in next((tmp_path / "run" / "csv").rglob("metrics.csv")).read_text()


def test_a_configuration_with_a_single_logger_node_still_loads(tmp_path):
    node = {"_target_": "llm.callbacks.file_loggers.csv_logger", "_partial_": True, "flush_every": 5}
    save({"logger": node}, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml")["logger"] == {"csv": node}
    save({"logger": {"csv": node}}, tmp_path / "config.yaml")
    assert json.dumps(load(tmp_path / "config.yaml")["logger"]) == json.dumps({"csv": node})
