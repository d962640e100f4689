"""What a command prints of the log, and where the rest goes."""

import logging
import warnings

import pytest

from llm.commands.console import OwnLines
from llm.training import train
from llm.training.quiet import quiet_libraries


@pytest.mark.parametrize(
    ("name", "level", "is_printed"),
    [
        ("llm.training.train", logging.INFO, True),
        ("data.sources", logging.INFO, True),
        ("root", logging.INFO, False),  # the compiler's command lines of DeepSpeed
        ("lightning.fabric.utilities.distributed", logging.INFO, False),
        ("deepspeed", logging.WARNING, True),
        ("llmore", logging.INFO, False),
    ],
)
def test_own_lines_and_warnings_are_printed(name, level, is_printed):
    assert OwnLines().filter(logging.LogRecord(name, level, "", 0, "line", None, None)) is is_printed


def test_warnings_of_deprecation_are_logged_and_others_shown(caplog, recwarn, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda *arguments: shown.append(arguments[0]))
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda *arguments: shown.append(arguments[0]))
        quiet_libraries()
        warnings.warn("gone in the next version", FutureWarning, stacklevel=1)
        warnings.warn("about the run", UserWarning, stacklevel=1)
    assert [str(message) for message in shown] == ["about the run"]
    assert "FutureWarning: gone in the next version" in caplog.text


def test_a_command_writes_lines_of_libraries_to_train_log_alone(train_here, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "announce", lambda *_: logging.info("gcc -c test.c"))
    short = ("data=synthetic", "tokenizer=bytes", "model/size=tiny", "context_length=32", "batch_tokens=64")
    code, out, _ = train_here(*short, "max_steps=1", "trainer=cpu", f"hydra.run.dir={tmp_path}/run")
    assert code == 0
    assert "step 1/1" in out
    assert "gcc" not in out
    assert "gcc -c test.c" in (tmp_path / "run" / "train.log").read_text()
