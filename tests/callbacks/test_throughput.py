import time

import lightning as L
import pytest

from llm.callbacks.throughput import Throughput

STEP = 0.05  # seconds of sleep in a micro-step, two of them an update, 32 tokens


def of(trainer):
    return next(callback for callback in trainer.callbacks if isinstance(callback, Throughput))


class SlowElsewhere(L.Callback):
    """Takes long where the clock must not run: in the first update, in validation, while saving."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            time.sleep(0.5)

    def on_validation_epoch_start(self, trainer, pl_module):
        time.sleep(0.5)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        time.sleep(0.5)


def test_only_training_is_timed(folder, train, tiny_module):
    module = tiny_module(seconds_a_step=STEP)
    trainer = train(folder, max_steps=9, val_every=3, checkpoint_every=2, module=module, extra=[SlowElsewhere()])
    figures = of(trainer).final_figures(trainer, module)
    # 8 timed updates of two sleeps; above them the step itself, some ms, on a machine that others use too
    assert 16 * STEP <= figures["training_seconds"] < 16 * STEP + 0.4
    assert figures["tokens_per_second"] == pytest.approx(8 * 32 / figures["training_seconds"])
    assert figures["mfu"] == pytest.approx(figures["tokens_per_second"] * 1000 / 1e9)
    summary = folder.read_summary()
    assert summary["tokens_per_second"] == figures["tokens_per_second"]
    assert summary["mfu"] == figures["mfu"]
    assert summary["flops_per_token"] == 1000
    seconds = [line["training_seconds"] for line in folder.read_metrics() if "training_seconds" in line]
    assert len(seconds) >= 7  # of all updates but the first, so that reports can draw the loss against them
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] < seconds[-1] <= figures["training_seconds"]


def test_an_unknown_peak_gives_no_mfu(folder, train, tiny_module):
    module = tiny_module()
    trainer = train(folder, max_steps=3, module=module)
    throughput = of(trainer)
    throughput.peak_flops = None
    assert throughput.final_figures(trainer, module)["mfu"] == "n/a"
    assert "mfu" not in throughput.step_metrics(trainer, module)
    assert throughput.step_metrics(trainer, module)["tokens_per_second"] > 0


def test_the_first_update_has_no_figure_and_the_others_do(folder, train):
    train(folder, max_steps=4, val_every=100)
    assert ["tokens_per_second" in line for line in folder.read_metrics()] == [False, True, True, True]


def test_a_resumed_run_adds_to_the_total():
    throughput = Throughput(peak_flops=None, window=5)
    throughput.load_state_dict({"tokens": 640, "seconds": 2.0})
    assert throughput.state_dict() == {"tokens": 640, "seconds": 2.0}
    assert throughput.tokens_per_second is None
