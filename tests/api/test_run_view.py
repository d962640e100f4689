import numpy as np
import pytest
import torch

import llm
from llm.api.metric_columns import metric_columns


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    settings = ("model=moe", "model.ffn.num_experts=4", "callbacks.samples=null", "trainer.precision=32-true")
    return llm.train(llm.compose(*tiny, *settings, f"hydra.run.dir={folder}"))


def test_metrics_are_one_array_per_name(run):
    metrics = run.metrics
    assert metrics["step"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert metrics["train/loss"].dtype == np.float64
    steps, values = metrics.points("val/loss")
    assert steps.tolist() == [4, 8]
    assert values[-1] == run.summary["val/loss"]
    with pytest.raises(llm.ConfigError, match="not recorded; the run has step, tokens_seen"):
        metrics["loss"]


def test_several_numbers_per_line_are_an_array_of_two_dimensions_and_one_column_each_in_pandas(run):
    (name, *_) = [name for name in run.metrics if name.endswith("expert_load_global")]
    assert run.metrics[name].shape == (8, 4)
    frame = run.metrics.to_pandas()
    assert frame.index.name == "step"
    assert frame[f"{name}.3"].to_numpy() == pytest.approx(run.metrics[name][:, 3])


def test_missing_numbers_and_numbers_that_are_not_finite_are_nan():
    columns = metric_columns([{"step": 1, "a": 1.0}, {"step": 2, "a": None, "b": [1, None]}])
    assert np.isnan(columns["a"][1])
    assert np.isnan(columns["b"]).tolist() == [[True, True], [False, True]]
    assert columns.points("b")[0].tolist() == [2]


def test_a_loaded_model_computes_and_its_tokenizer_encodes(run):
    model, tokenizer = run.load()
    assert not model.training
    ids = torch.tensor([list(map(int, tokenizer.encode_batch(["1 plus 1"])[0]))])
    positions = torch.arange(ids.shape[1])[None]
    assert model(ids, positions=positions).hidden.shape == (*ids.shape, 32)
    assert next(run.load(average=2).model.parameters()).ne(next(model.parameters())).any()
    with pytest.raises(llm.CrucibleError, match="checkpoint=first: not in"):
        run.load("first")


def test_generation_returns_the_form_of_its_prompts_and_repeats(run):
    text = run.generate("1 plus", max_new_tokens=6, seed=3)
    assert text.startswith("1 plus")
    assert run.generate(["1 plus", ""], max_new_tokens=6, seed=3, temperature=0)[0].startswith("1 plus")
    assert run.generate("1 plus", max_new_tokens=6, seed=3) == text
    assert run.generate("1 plus", max_new_tokens=6, seed=4) != text
    with pytest.raises(llm.ConfigError, match=r"temprature=1: unknown setting; did you mean temperature\?"):
        run.generate("1", temprature=1)
    with pytest.raises(llm.ConfigError, match="max_new_tokens=500: too many"):
        run.generate("1", max_new_tokens=500)


def test_an_evaluation_returns_and_writes_its_figures(run):
    figures = run.evaluate("loss")
    assert figures["val/loss"] == pytest.approx(run.summary["val/loss"], abs=1e-6)
    assert "nats per token" in repr(figures)
    assert (run.folder / "eval" / "loss.json").is_file()
    strided = run.evaluate("loss", "eval.loss.stride=16")
    assert strided["val/loss"] != figures["val/loss"]
    assert run.evaluate("experts", "eval.experts.batches=1")._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(llm.ConfigError, match=r"eval=los: no such option; did you mean loss\?"):
        run.evaluate("los")


def test_a_notebook_shows_the_figures_and_the_curves_of_a_run(run, tmp_path):
    assert "val/loss" in run._repr_html_()
    assert "finished, val/loss" in repr(run)
    picture = run.plot()
    assert picture._repr_png_().startswith(b"\x89PNG")
    picture.save(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() == picture.png


def test_runs_are_compared_as_in_a_report(run, tiny, tmp_path):
    other = llm.train(
        llm.compose(*tiny, "optimizer.lr=1e-9", "callbacks.samples=null", f"hydra.run.dir={tmp_path}/other")
    )
    comparison = llm.compare([run, other.folder])
    assert [row["loss"] for row in comparison.rows] == sorted([run.summary["val/loss"], other.summary["val/loss"]])
    assert "best lr" in repr(comparison)
    page = comparison.write(tmp_path / "report")
    assert page.name == "index.html"
    assert (tmp_path / "report" / "leaderboard.csv").is_file()
