import copy
import os
import signal
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel; more threads than cores slow them down

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts its background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from catalogue import CONF
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings
from omegaconf import OmegaConf

from llm.commands.cli import run_command
from llm.config.check import check
from llm.config.files import to_plain
from llm.distributed.launch import STOPPING
from llm.training.train import train

settings.register_profile("unhurried", deadline=None)  # a busy machine is slow, and that is no failure
settings.load_profile("unhurried")

WATCHED = (*STOPPING, signal.SIGCHLD)
"""Signals whose handlers a test must put back."""


@pytest.fixture(autouse=True)
def signals_as_found():
    """Fail a test that leaves a signal handler behind, which could stop a later test's run."""
    before = {number: signal.getsignal(number) for number in WATCHED}
    yield
    after = {number: signal.getsignal(number) for number in WATCHED}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before, "a signal handler is left behind"


TINY = (
    "model.d_model=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.ffn.d_ff=48",
    "tokenizer=bytes",
    "context_length=32",
    "batch_tokens=256",
    "scaling.base_batch_tokens=256",
    "micro_batch_size=4",
    "max_steps=8",
    "val_every=4",
    "checkpoint_every=4",
    "loader.val_tokens=512",
    "loader.val_fraction=0.2",
    "trainer=cpu",
    "callbacks.samples.max_new_tokens=8",
    "callbacks.curves=null",
)
"""Overrides of a run that takes seconds."""


@pytest.fixture(scope="session")
def judging():
    """Compose `conf/eval.yaml` with overrides into a plain dict."""

    def make(*overrides: str) -> dict[str, Any]:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return to_plain(compose("eval", overrides=list(overrides)))

    return make


@pytest.fixture(scope="session")
def composed():
    """Compose `conf/train.yaml` with overrides into a plain dict; each answer is a fresh copy."""
    cache: dict[tuple[str, ...], dict[str, Any]] = {}

    def make(*overrides: str) -> dict[str, Any]:
        if overrides not in cache:
            GlobalHydra.instance().clear()
            with initialize_config_dir(str(CONF), version_base="1.3"):
                cfg = compose("train", overrides=["name=test", *overrides])
                OmegaConf.resolve(cfg)
                cache[overrides] = to_plain(cfg)
        return copy.deepcopy(cache[overrides])

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of forty small text files, each a document with letters and numbers of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    for n in range(40):
        lines = [f"{n} plus {i} makes {n + i}, and {n} times {i} makes {n * i}." for i in range(20)]
        (folder / f"{n}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny(corpus, tmp_path_factory) -> list[str]:
    """Overrides of a run on `corpus` that takes seconds, with a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    return [*TINY, "data=text", f"data.files={corpus}/*.txt", f"loader.cache_dir={cache}"]


@pytest.fixture
def train_here(tmp_path, monkeypatch, capsys):
    """Call the command line of train.py in this process; return exit status, whole output and standard error."""

    def make(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        try:
            run_command(train, config_name="train", check=check)
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        printed = capsys.readouterr()
        return status, printed.out + printed.err, printed.err

    return make


@pytest.fixture
def foreign():
    """Return a function that writes foreign files: `foreign(folder, names)`. At the end, all must be unchanged."""
    written = {}

    def write(folder, names):
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"mine: {name}")
            written[path] = path.read_bytes()

    yield write
    lost = [str(path) for path, content in written.items() if not path.is_file() or path.read_bytes() != content]
    assert lost == []


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
