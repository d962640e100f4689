"""Each private name of Lightning that the project uses exists in the installed version."""

import importlib
import tomllib

import lightning as L
import pytest
from catalogue import CONF
from lightning.pytorch.callbacks import WeightAveraging

from llm.distributed.lightning_private import (
    OVERRIDDEN,
    WEIGHT_AVERAGING_STATE,
    is_last_micro_batch,
    take_sigterm,
    validation_follows,
)


def test_lightning_has_an_upper_bound():
    project = tomllib.loads((CONF.parent / "pyproject.toml").read_text())["project"]
    (bound,) = (line for line in project["dependencies"] if line.startswith("lightning"))
    assert "<2.7" in bound


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in OVERRIDDEN.items() for name in names])
def test_an_overridden_method_exists(owner, name):
    module, _, cls = owner.rpartition(".")
    assert callable(getattr(getattr(importlib.import_module(module), cls), name))


@pytest.mark.parametrize("name", WEIGHT_AVERAGING_STATE)
def test_an_attribute_of_weight_averaging_exists(name):
    assert hasattr(WeightAveraging(), name)


def test_the_loops_of_a_trainer_answer_when_a_validation_and_an_update_follow():
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append((is_last_micro_batch(trainer), validation_follows(trainer)))

    trainer = L.Trainer(
        max_steps=2, accumulate_grad_batches=2, val_check_interval=4, check_val_every_n_epoch=None, logger=False,
        callbacks=[Look()], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", num_sanity_val_steps=0,
    )  # fmt: skip
    from lightning.pytorch.demos.boring_classes import BoringModel

    trainer.fit(BoringModel())
    assert [last for last, _ in seen] == [False, True, False, True]
    assert [follows for _, follows in seen] == [False, False, False, True]


def test_a_sigterm_that_lightning_noted_is_taken_once():
    trainer = L.Trainer(accelerator="cpu", logger=False)
    trainer._signal_connector.received_sigterm = True
    assert take_sigterm(trainer)
    assert not take_sigterm(trainer)
