import pytest

from llm.training.train import train


@pytest.fixture(scope="session")
def trained(composed, tiny, tmp_path_factory):
    """A run that learnt a little: [folder, its validation loss]."""
    folder = tmp_path_factory.mktemp("trained")
    settings = ("max_steps=40", "optimizer.lr=1e-2", "val_every=20", "checkpoint_every=10", "trainer.precision=32-true")
    loss = train(composed(*tiny, *settings, "callbacks.checkpoints.keep=4", "callbacks.samples=null"), folder)
    return folder, loss
