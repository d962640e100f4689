"""`python -m llm.compress`: the run folder that it writes, its losses, and what reads it."""

import json

import pytest
import torch

from llm.commands.compress import check_compress, compress
from llm.commands.evaluate import evaluate
from llm.commands.export import ExportConfig, export
from llm.config.files import load
from llm.errors import ConfigError
from llm.training.rebuild import rebuild_model
from llm.training.train import train

GIVEN = {"checkpoint": "last", "average": 1, "curve": [0.5], "tokens": 256}


@pytest.fixture(scope="module")
def source(composed, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "run"
    train(composed(*tiny, "optimizer.lr=1e-2", "max_steps=12", "callbacks.samples=null"), folder)
    return folder


def compressed(source, out, **given):
    return compress(check_compress({"run_dir": str(source), "out": str(out), **GIVEN, **given}))


@pytest.mark.parametrize("method", ["svd", "interpolative", "column_row"])
def test_everything_kept_has_the_loss_of_the_run(source, judging, tmp_path, method):
    out = compressed(source, tmp_path / "out", method=method, rank=100, curve=[])
    before = json.loads((source / "summary.json").read_text())["val/loss"]
    after = evaluate(judging(f"run_dir={out}", "eval=[loss]"), tmp_path / "eval")
    assert after == pytest.approx(before, abs=2e-3)  # the run itself multiplies in bf16 where the CPU can
    assert json.loads((out / "summary.json").read_text())["val/loss"] == pytest.approx(before, abs=2e-3)


def test_a_share_of_the_weights_is_kept_and_the_corrected_units_lose_less(source, tmp_path, caplog):
    losses = {}
    for method in ("interpolative", "column_row"):
        with caplog.at_level("INFO"):
            out = compressed(source, tmp_path / method, method=method, share=0.25)
        assert load(out / "config.yaml")["model"]["ffn"]["d_ff"] == 12
        losses[method] = json.loads((out / "summary.json").read_text())["val/loss"]
    assert losses["interpolative"] < losses["column_row"]
    assert "0.5000" in caplog.text  # the curve
    assert "model.ffn.d_ff=12" in caplog.text


@pytest.mark.parametrize("method", ["svd", "interpolative", "column_row"])
def test_biases_stay_with_their_units(composed, tiny, tmp_path, method):
    biased = ("model.attention.bias=all", "model.ffn.bias=true", "max_steps=2", "optimizer.lr=1e-2")
    train(composed(*tiny, *biased, "callbacks.samples=null"), tmp_path / "biased")
    before = rebuild_model(tmp_path / "biased", "last").model
    with torch.no_grad():
        assert any(bool(tensor.any()) for name, tensor in before.named_parameters() if name.endswith("up_proj.bias"))
    rank = 32 if method == "svd" else 40
    after = rebuild_model(compressed(tmp_path / "biased", tmp_path / "o", method=method, rank=rank), "last").model
    ids = torch.randint(before.vocab_size, (2, 16))
    hidden = [model(ids, positions=torch.arange(16).expand_as(ids)).hidden for model in (before, after)]
    error = float((hidden[0] - hidden[1]).norm() / hidden[0].norm())
    assert error < (1e-5 if method == "svd" else 0.2)  # rank 32 is the whole rank of every projection


def test_dropped_units_keep_their_own_rows(source, tmp_path):
    before = rebuild_model(source, "last").model.layers[0].ffn
    after = (
        rebuild_model(compressed(source, tmp_path / "o", method="interpolative", rank=20), "last").model.layers[0].ffn
    )
    rows = {tuple(row.tolist()) for row in before.up_proj.weight}
    assert all(tuple(row.tolist()) in rows for row in after.up_proj.weight)
    assert after.down_proj.weight.shape == (32, 20)


def test_factors_keep_at_most_their_share(source, tmp_path):
    out = compressed(source, tmp_path / "out", method="svd", share=0.5)
    before, after = (rebuild_model(folder, "last").model for folder in (source, out))
    for name, layer in after.layers[0].named_modules():
        if name.endswith("_proj"):
            whole = before.layers[0].get_submodule(name).weight
            assert sum(p.numel() for p in layer.parameters()) <= 0.5 * whole.numel()
            assert torch.linalg.matrix_rank(layer.weight) < min(whole.shape)


@pytest.mark.parametrize(("method", "setting"), [("svd", "model.low_rank={}"), ("column_row", "model.ffn.d_ff=24")])
def test_training_continues_from_it_and_does_not_resume(source, composed, tiny, tmp_path, method, setting):
    out = compressed(source, tmp_path / "out", method=method, share=0.5)
    if method == "svd":
        ranks = load(out / "config.yaml")["model"]["low_rank"]
        setting = "model.low_rank={" + ",".join(f"{key}:{value}" for key, value in ranks.items()) + "}"
    kept = [t for t in tiny if not t.startswith("model.ffn.d_ff")]
    width = [] if method == "column_row" else ["model.ffn.d_ff=48"]
    again = tmp_path / "again"
    train(composed(*kept, *width, setting, "max_steps=1", "optimizer.lr=1e-12", f"init_from={out}"), again)
    own, back = (rebuild_model(folder, "last").model.state_dict() for folder in (out, again))
    for name, tensor in own.items():
        torch.testing.assert_close(back[name], tensor, atol=1e-9, rtol=1e-6)
    with pytest.raises(ConfigError, match=rf"resume=.*made by {method}.*init_from="):
        train({**load(out / "config.yaml"), "resume": str(out), "max_steps": 20}, out)


def test_dropped_units_are_exported_and_factors_are_refused(source, tmp_path):
    pytest.importorskip("transformers")
    given = {"checkpoint": "last", "average": 1, "format": "hf", "dtype": "float32", "tokens": 64}
    out = compressed(source, tmp_path / "units", method="interpolative", share=0.5)
    export(ExportConfig(run_dir=str(out), out=str(tmp_path / "hf"), **given))
    assert json.loads((tmp_path / "hf/config.json").read_text())["intermediate_size"] == 24
    out = compressed(source, tmp_path / "factors", method="svd", share=0.5)
    with pytest.raises(ConfigError, match=r"model\.low_rank factors projections"):
        export(ExportConfig(run_dir=str(out), out=str(tmp_path / "none"), **given))
    with pytest.raises(ConfigError, match="already factored"):
        compressed(out, tmp_path / "twice", method="svd", share=0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "rank=None share=None: set one of them"),
        ({"rank": 4, "share": 0.5}, "rank=4 share=0.5: set one"),
        ({"rank": 0}, "rank=0: must be at least 1"),
        ({"share": 1.5}, r"share=1.5: must lie in \(0, 1\]"),
        ({"share": 0.5, "tokens": 32}, "tokens=32: fewer than the 48 hidden units"),
        ({"share": 0.5, "method": "qr"}, "method='qr': must be one of svd | interpolative | column_row"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(source, tmp_path, given, message):
    with pytest.raises(ConfigError, match=message.replace("|", r"\|") if "qr" in message else message):
        compressed(source, tmp_path / "out", **{"method": "column_row", **given})
    assert not (tmp_path / "out").exists()


def test_experts_are_not_dropped(composed, tiny, tmp_path):
    kept = [t for t in tiny if not t.startswith("model.ffn")]
    train(composed(*kept, "model=moe", "model.ffn.d_ff=48", "max_steps=1", "val_every=1"), tmp_path / "moe")
    with pytest.raises(ConfigError, match="layer 0 has MoE"):
        compressed(tmp_path / "moe", tmp_path / "out", method="interpolative", share=0.5)
