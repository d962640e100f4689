import pytest
from fault_harness import Fault

from llm.checking import check
from llm.cli import run_command
from llm.training import train

LONG = ("max_steps=40", "checkpoint_every=4", "val_every=20", "model.dropout=0.1", "callbacks.samples=null")


@pytest.fixture
def fault(tiny, tmp_path):
    """A run folder to do something to."""
    return Fault(base=[*tiny, *LONG], cwd=tmp_path)


@pytest.fixture(scope="session")
def steady(tiny, tmp_path_factory):
    """The losses of a run that nothing happens to."""
    outcome = Fault(base=[*tiny, *LONG], cwd=tmp_path_factory.mktemp("steady")).run()
    assert outcome.status == 0, outcome.err
    return outcome.losses


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Call train.py's command line in this process: (exit status, what it said)."""

    def make(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        try:
            run_command(train, config_name="train", check=check)
            status = 0
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr()
        return status, said.out + said.err

    return make
