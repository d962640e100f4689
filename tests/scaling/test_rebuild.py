import pytest

from llm.training.rebuild import rebuild
from llm.training.train import train


@pytest.mark.parametrize(
    "choices",
    [
        ("scaling=sign", "callbacks=noise_scale", "callbacks.samples=null", "callbacks.curves=null"),
        ("batch_schedule=doubling", "batch_schedule.every_tokens=128", "callbacks.samples=null"),
        ("scaling=sqrt", "scaling.base_batch_tokens=64", "keep_half_life=true", "callbacks.samples=null"),
    ],
    ids=["measured", "ramp", "half-life"],
)
def test_a_run_whose_rates_follow_from_its_batch_reads_windows_of_another_length(composed, tiny, tmp_path, choices):
    train(composed(*tiny, "max_steps=2", "val_every=2", *choices), tmp_path)
    for context_length in (None, 64, 128):
        found = rebuild(tmp_path, "last", context_length=context_length)
        assert found.config.tree["context_length"] == (context_length or 32)
