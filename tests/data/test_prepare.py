import logging
import subprocess
import sys
from pathlib import Path

import pytest

from llm.commands import prepare

ROOT = Path(prepare.__file__).parent.parent


def test_prepare_runs_as_a_command_and_builds_once(tmp_path, texts, monkeypatch, caplog):
    for i, text in enumerate(texts):
        (tmp_path / f"{i:03}.txt").write_text(text * 3)
    overrides = ["data=text", f"data.files='{tmp_path}/*.txt'", "tokenizer=bytes", "context_length=32"]
    overrides += [f"loader.cache_dir={tmp_path}/cache", "loader.val_fraction=0.1", "data.document_bytes=null"]
    command = [sys.executable, "-m", "data.prepare", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "documents      200" in done.stdout
    folder = next(path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir())
    before = folder.stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["prepare", *overrides])
    with caplog.at_level(logging.INFO):
        prepare.main()
    assert str(folder) in caplog.text
    assert folder.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data=txt", "data=txt: no such option; did you mean text?"),
        ("data.fils=a", "data.fils"),
        ("data=text data.files=/nowhere", "data.files=/nowhere: no such file"),
        ("data=text", "data.files"),
        ("optimiser=adamw", "optimiser: unknown key; did you mean optimizer?"),
        ("+optimiser=adamw", "optimiser=adamw: unknown key; did you mean optimizer?"),
        ("data._target_=os.system", "data._target_=os.system: not on the allow-list"),
        ("loader.val_fraction=2", "loader.val_fraction=2: must be above 0 and below 1"),
        ("data=synthetic data.order=99", "data.order=99: num_symbols ** order must be at most 65536"),
        ("tokenizer=pretrained tokenizer.path=/nowhere", "tokenizer.path=/nowhere: cannot be read"),
    ],
)
def test_a_mistake_gives_one_message_and_exit_status_two(overrides, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare", *overrides.split()])
    with pytest.raises(SystemExit) as stopped:
        prepare.main()
    assert stopped.value.code == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {message}")
    assert others == []


def test_help_describes_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare", "--help"])
    prepare.main()
    assert "overrides of train.py" in capsys.readouterr().out
