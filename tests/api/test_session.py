import inspect
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogue import CONF
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import llm
from llm.training.module import LanguageModule

QUICK = ("callbacks.samples=null", "trainer.precision=32-true")


@pytest.fixture
def session(tiny, tmp_path, monkeypatch):
    """Overrides of a run of eight updates, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return [*tiny, *QUICK]


@pytest.fixture
def at_step(monkeypatch):
    """Call a function during the forward pass of one update."""

    def install(step, call):
        original = LanguageModule.training_step

        def training_step(self, batch, batch_idx):
            if self.global_step == step and not done:
                done.append(step)
                call()
            return original(self, batch, batch_idx)

        done = []
        monkeypatch.setattr(LanguageModule, "training_step", training_step)

    return install


def losses(run):
    return run.metrics["train/loss"].tolist()


def test_importing_the_package_loads_no_torch():
    code = (
        "import sys, llm; assert {*llm.__all__} <= {*dir(llm)}; print('torch' in sys.modules or 'hydra' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CONF.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_every_exported_name_is_described_on_its_page():
    page = (CONF.parent / "docs" / "python.md").read_text()
    for name in llm.__all__:
        assert re.search(rf"\b(llm\.{name}|{name})\b", page), name
        assert getattr(llm, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = llm.trian


def test_a_later_run_of_a_session_has_the_numbers_of_a_fresh_process(session, tmp_path):
    llm.train(llm.compose(*session, "optimizer=muon", "seed=5", "trainer.deterministic=true", "max_steps=2"))
    here = llm.train(llm.compose(*session))
    command = [sys.executable, str(CONF.parent / "train.py"), *session, f"hydra.run.dir={tmp_path}/fresh"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(CONF.parent)})
    fresh = llm.open_run(tmp_path / "fresh")
    assert losses(here) == losses(fresh)
    assert here.summary["val/loss"] == fresh.summary["val/loss"]
    assert here.config == fresh.config
    assert sorted(p.name for p in here.folder.iterdir()) == sorted(p.name for p in fresh.folder.iterdir())


def state_of_the_process():
    """Return what a run must restore, except Python's random state, from which the tests' type checker draws."""
    names = [name for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)]
    loggers = [logging.root, *map(logging.getLogger, names)]
    return {
        "environment": dict(os.environ),
        "filters": list(warnings.filters),
        "loggers": {x.name: (x.level, x.disabled, x.propagate, list(x.handlers)) for x in loggers},
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)],
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": torch.backends.cudnn.benchmark,
        "gradients": torch.is_grad_enabled(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "hydra": (GlobalHydra.instance().hydra, HydraConfig.instance().cfg),
        "folder": Path.cwd(),
    }


def test_a_run_restores_the_state_of_the_process(session):
    cfg = llm.compose(*session, "trainer.deterministic=true", "max_steps=2", "callbacks.stop_signals=null")
    torch.set_grad_enabled(False)
    try:
        before = state_of_the_process()
        run = llm.train(cfg)
        run.generate("1", max_new_tokens=2)
        run.evaluate("loss")
        after = state_of_the_process()
    finally:
        torch.set_grad_enabled(True)
    after["loggers"] = {name: after["loggers"][name] for name in before["loggers"]}  # imports may add loggers
    for part, value in before.items():
        assert after[part] == value, part


def test_an_interrupted_run_raises_in_the_session_and_resumes_to_the_same_numbers(session, at_step):
    whole = llm.train(llm.compose(*session, "name=whole"))
    at_step(2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        llm.train(llm.compose(*session, "hydra.run.dir=stopped"))
    stopped = llm.open_run("stopped")
    assert stopped.summary["status"] == "stopped: SIGINT"
    assert stopped.metrics["step"].tolist() == [1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = llm.train(llm.compose("resume=stopped"))
    assert resumed.summary["status"] == "finished"
    assert losses(resumed) == losses(whole)


def test_an_interrupt_inside_an_update_raises_and_leaves_the_last_checkpoint(session, at_step):
    def interrupt():
        raise KeyboardInterrupt

    at_step(5, interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.train(llm.compose(*session, "hydra.run.dir=stopped"))
    assert llm.open_run("stopped").resume().summary["steps"] == 8


def test_a_signal_that_stops_a_run_reaches_the_handler_of_the_session(session, at_step):
    received = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        at_step(1, lambda: signal.raise_signal(signal.SIGTERM))
        run = llm.train(llm.compose(*session))
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [signal.SIGTERM]
    assert run.summary["status"] == "stopped: SIGTERM"


def test_an_interrupt_before_the_run_has_begun_leaves_no_folder(session, monkeypatch):
    def prepare_data(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data.data_module.TokenDataModule.prepare_data", prepare_data)
    Path("runs").mkdir()
    with pytest.raises(KeyboardInterrupt):
        llm.train(llm.compose(*session))
    assert list(Path("runs").iterdir()) == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=muno", "model.num_heads=6"],
        ["optimizer.lr=-1", "modle=moe"],
        ["max_steps=1,2"],
        ["resume=missing"],
        ["data=text"],
    ],
    ids="+".join,
)
def test_mistakes_are_exceptions_with_the_lines_of_the_command_line(overrides, train_here):
    status, _, printed = train_here(*overrides)
    with pytest.raises(llm.ConfigError) as raised:
        llm.compose(*overrides)
    assert status == 2
    assert [f"error: {line}" for line in str(raised.value).splitlines()] == printed.splitlines()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: llm.compose("-m", "seed=1,2"), "composes one run"),
        (lambda: inspect.unwrap(llm.train)({"seed": 1}), "not a configuration"),
        (lambda: llm.train(llm.compose("plan=true")), "plan=true: trains nothing"),
        (lambda: llm.open_run("missing"), "missing: holds no config.yaml"),
        (lambda: llm.compare([]), "nothing to compare"),
        (lambda: llm.compare("missing"), "missing: no such folder"),
    ],
)
def test_a_call_that_cannot_work_is_one_clear_exception(call, message):
    with pytest.raises(llm.ConfigError, match=message):
        call()


def test_a_folder_that_has_a_run_is_refused(session):
    cfg = llm.compose(*session, "max_steps=1", "hydra.run.dir=taken")
    llm.train(cfg)
    with pytest.raises(llm.ConfigError, match="already has a run"):
        llm.train(cfg)


def test_a_configuration_reads_like_its_file_and_describes_its_plan(session):
    cfg = llm.compose(*session, "optimizer.lr=2e-3")
    assert cfg["optimizer"]["lr"] == 2e-3
    assert "lr: 0.002" in str(cfg)
    assert "optimizer=" not in repr(cfg)
    assert "Optimizer receipt" in cfg.plan()


def test_log_lines_go_to_the_handlers_of_the_session_or_else_to_standard_output(session, capsys, monkeypatch):
    cfg = llm.compose(*session, "max_steps=1")
    monkeypatch.setattr(logging.root, "handlers", [])
    llm.train(cfg)
    assert "run folder" in capsys.readouterr().out
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(logging.root, "handlers", [handler])
    run = llm.train(cfg)
    assert "run folder" not in capsys.readouterr().out
    assert any(line.startswith("run folder") for line in lines)
    assert (run.folder / "train.log").read_text().startswith("run folder")
