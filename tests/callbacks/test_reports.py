"""Progress, samples, curves and summary."""

import io
import logging
import sys

import lightning as L
import pytest
from matplotlib.image import imread

from llm.callbacks.curves import Curves, draw_curves
from llm.callbacks.progress import ProgressLine
from llm.callbacks.samples import Samples
from llm.errors import ConfigError
from llm.run_folder.folder import SUMMARY_KEYS
from llm.training.train import train as run


def samples(folder, **options):
    sampling = {"max_new_tokens": 8, "temperature": 1.0, "top_k": None, "top_p": None, "seed": 0}
    return Samples(**{"run_folder": folder, "every_validations": 2, "prompts": ["", "a "]} | sampling | options)


def test_without_a_terminal_a_line_is_logged_now_and_then(folder, train, caplog):
    caplog.set_level(logging.INFO)
    train(
        folder, max_steps=7, val_every=4, extra=[ProgressLine(every=3, refresh_seconds=0.5)], enable_progress_bar=True
    )
    lines = [record.getMessage() for record in caplog.records if record.name == "llm.callbacks.progress"]
    assert [line.split("  ")[0] for line in lines] == ["step 3/7", "step 4", "step 6/7", "step 7/7", "step 7"]
    assert "loss" in lines[0]
    assert "tokens/s" in lines[0]
    assert "left" in lines[0]
    assert "val/loss" in lines[1]


def test_figures_of_a_bound_are_marked_in_the_lines_of_validation(composed, tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(composed(*tiny, "objective=masked", "callbacks.samples=null", "max_steps=1", "val_every=1"), tmp_path)
    lines = [
        r.getMessage() for r in caplog.records if r.name == "llm.callbacks.progress" and "val/loss" in r.getMessage()
    ]
    assert "val/loss <= " in lines[0]
    assert "val/perplexity <= " in lines[0]
    assert "val/loss_standard_error <= " not in lines[0]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_a_bar_is_drawn_and_log_lines_go_above_it(folder, train, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler(terminal)
    root = logging.getLogger()
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.INFO)
    try:
        train(
            folder,
            max_steps=5,
            val_every=2,
            extra=[ProgressLine(every=1, refresh_seconds=0.0)],
            enable_progress_bar=True,
        )
        assert handler.stream is terminal
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    shown = terminal.getvalue()
    assert "5/5" in shown
    assert "tokens/s" in shown
    assert "step 2  val/loss" in shown
    assert sys.stdout is terminal


def test_samples_are_written_every_few_validations_and_shown_at_the_end(folder, train, tiny_module, caplog):
    caplog.set_level(logging.INFO)
    module = tiny_module()
    train(folder, max_steps=7, val_every=2, module=module, extra=[samples(folder)])
    text = (folder.path / "samples.txt").read_text()
    assert module.sampled == [4, 7]
    assert text.count("--- step") == 2
    assert "['a '] a 0." in text
    assert any("--- step 7 ---" in record.getMessage() for record in caplog.records)


def test_sampling_does_not_change_what_is_trained(tmp_path, folder, train):
    """The stand-in draws from torch's own generator, as a careless sampler would."""
    other = type(folder)(tmp_path / "other")
    other.claim()
    train(folder, max_steps=8, val_every=2)
    train(other, max_steps=8, val_every=2, extra=[samples(other, every_validations=1)])
    losses = [line["train/loss"] for line in folder.read_metrics()]
    assert losses == [line["train/loss"] for line in other.read_metrics()]


def test_curves_are_drawn_when_training_ends(folder, train):
    train(folder, max_steps=6, extra=[Curves(run_folder=folder)])
    picture = imread(folder.path / "curves.png")
    assert picture.shape[0] > 500
    assert picture[..., :3].std() > 0.05  # a blank page has next to none


def test_curves_of_a_run_without_lines_say_so_instead_of_failing(tmp_path):
    draw_curves([], tmp_path / "curves.png")
    draw_curves([{"step": 1, "train/loss": None, "grad_norm": 1.0}], tmp_path / "one.png")
    assert imread(tmp_path / "curves.png").shape == imread(tmp_path / "one.png").shape


def test_the_summary_of_a_finished_run_is_complete(folder, train):
    train(folder, max_steps=6, val_every=4)
    summary = folder.read_summary()
    assert summary["status"] == "finished"
    assert set(SUMMARY_KEYS) <= set(summary)
    assert (summary["steps"], summary["tokens_seen"]) == (6, 192)
    assert summary["val/loss"] == pytest.approx(folder.read_metrics()[-1]["val/loss"])
    assert summary["parameters"] == summary["active_parameters"] == 8 * 8 + 8 + 8
    # AdamW: two fp32 moments a parameter, and a step counter in fp32 for each of the three tensors
    assert summary["optimizer_state_bytes"] == 80 * 2 * 4 + 3 * 4
    assert summary["peak_memory_bytes"] > 10**7
    assert 0 < summary["seconds"] < 60
    assert summary["versions"]["torch"]


def test_active_parameters_count_the_share_that_a_module_uses(folder, train, tiny_module):
    module = tiny_module()
    module.inner.active_fraction = 0.25
    train(folder, max_steps=1, module=module)
    assert folder.read_summary()["active_parameters"] == 64 // 4 + 8 // 4 + 8


def test_the_summary_is_running_meanwhile_and_has_the_last_validation(folder, train):
    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(folder.read_summary())

    train(folder, max_steps=6, val_every=3, extra=[Look()])
    assert {summary["status"] for summary in seen} == {"running"}
    assert seen[0]["val/loss"] is None
    assert seen[-1]["val/loss"] > 0


@pytest.mark.parametrize("option", [{"every_validations": 0}, {"prompts": []}])
def test_sample_settings_out_of_range_are_refused(folder, option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        samples(folder, **option)
    with pytest.raises(ConfigError, match="every=0"):
        ProgressLine(every=0, refresh_seconds=1.0)


def test_without_the_progress_callback_nothing_shows_progress(composed, tiny, tmp_path, capfd):
    run(composed(*tiny, "callbacks.progress=null", "callbacks.samples=null", "max_steps=1", "val_every=1"), tmp_path)
    shown = "".join(capfd.readouterr())
    assert "Epoch" not in shown
    assert "it/s" not in shown
