import pytest
from fault_harness import Fault

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
