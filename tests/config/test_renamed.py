"""A run folder that version 0.1 wrote works with every command of this version."""

import json
import shutil
from pathlib import Path

import pytest

from llm.commands.evaluate import evaluate
from llm.commands.export import ExportConfig, export
from llm.config.files import load
from llm.config.renamed import present_target
from llm.config.signatures import DEFINED_IN, is_allowed, locate
from llm.report.runs import RunReader, find_runs
from llm.run_folder.checkpoint import load_model
from llm.training.train import train

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
LOSSES = json.loads((FIXTURES / "run_of_version_0.1_losses.json").read_text())
"""Losses that version 0.1 printed, by step.

Steps 1 to 4 are the run's own, in bf16. `resumed` has steps 3 and 4 of a resume from step 2 by that version, and
`evaluated` its `eval=[loss]`, both with trainer.precision=32-true, which every processor computes alike.
"""

FORMER_TARGETS = """
data.hub.HubDataset data.module.TokenDataModule data.sources.PythonSource data.synthetic.AssociativeRecall
data.synthetic.MarkovChain data.text_files.TextFiles data.tokenizer.BpeTokenizer data.tokenizer.ByteTokenizer
data.tokenizer.PretrainedTokenizer lightning.Trainer llm.attention.codebook.Codebook
llm.attention.linear.LinearAttention llm.attention.pattern.attention_of_layer
llm.attention.performer.PerformerAttention llm.attention.softmax.SoftmaxAttention llm.attention.vq.VQAttention
llm.callbacks.averaging.EMA llm.callbacks.averaging.LastAverage llm.callbacks.bad_steps.BadSteps
llm.callbacks.checkpoints.Checkpoints llm.callbacks.curves.Curves llm.callbacks.evaluations.Evaluations
llm.callbacks.expert_load.ExpertLoad llm.callbacks.file_loggers.csv_logger
llm.callbacks.file_loggers.tensorboard_logger llm.callbacks.final_validation.FinalValidation
llm.callbacks.noise_scale.NoiseScale llm.callbacks.optimizer_receipt.OptimizerReceipt
llm.callbacks.progress.ProgressLine llm.callbacks.rank_checksum.RankChecksum llm.callbacks.recorder.Recorder
llm.callbacks.rng_state.RngState llm.callbacks.samples.Samples llm.callbacks.stop_signals.StopSignals
llm.callbacks.summary.Summary llm.callbacks.throughput.Throughput llm.callbacks.wandb_logger.WandbRunLogger
llm.evals.attention.Attention llm.evals.codebook.Codebook llm.evals.experts.Experts
llm.evals.extrapolation.Extrapolation llm.evals.lm_eval.LMEval llm.evals.loss.Loss llm.evals.samples.Samples
llm.ffn.balance.aux_loss.AuxLoss llm.ffn.balance.base.Balance llm.ffn.balance.budget.Budget
llm.ffn.balance.loss_free.LossFree llm.ffn.balance.quantile.Quantile llm.ffn.moe.MoE llm.ffn.router.TopKRouter
llm.ffn.swiglu.SwiGLU llm.ffn.threshold_router.ThresholdRouter llm.init.fan_in_normal llm.norm.LayerNorm
llm.norm.RMSNorm llm.optim.lion.Lion llm.optim.muon.Muon llm.optim.sgd.SGD llm.optim.tiger.Tiger
llm.position.none.NoPosition llm.position.ntk.NTKMixedRoPE llm.position.ntk.NTKRoPE
llm.position.rerope.LeakyReRoPE llm.position.rerope.ReRoPE llm.position.rope.RoPE llm.scaling.amos.Amos
llm.scaling.batch_schedule.constant llm.scaling.batch_schedule.doubling llm.scaling.batch_schedule.stages
llm.scaling.mup.MuP llm.scaling.rates.Rates llm.scaling.rules.adam_eps llm.scaling.rules.linear
llm.scaling.rules.none llm.scaling.rules.sign llm.scaling.rules.sqrt llm.scaling.rules.variance
llm.scaling.spectral.Spectral llm.schedule.constant llm.schedule.cosine llm.schedule.inverse_time
llm.schedule.piecewise llm.schedule.wsd llm.spikes.RollbackGuard llm.spikes.SpikeGuard
llm.strategy.deepspeed_trainer llm.transformer.Transformer torch.optim.AdamW
"""
"""Every `_target_` in the configuration files of version 0.1."""

LATER_TARGETS = """
llm.distributed.strategy.deepspeed_trainer llm.model.ffn.balance.base.Balance
"""
"""Names that a `_target_` had between version 0.1 and this one, where they differ from both."""


@pytest.fixture
def former(tmp_path, monkeypatch) -> Path:
    """A copy of the run folder, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRUCIBLE_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(FIXTURES / "run_of_version_0.1", tmp_path / "run", symlinks=True))
    config = (folder / "config.yaml").read_text()
    assert "  precision: auto\n" in config
    (folder / "config.yaml").write_text(config.replace("  precision: auto\n", "  precision: 32-true\n"))
    return folder


@pytest.mark.parametrize("target", FORMER_TARGETS.split() + LATER_TARGETS.split())
def test_every_former_target_names_an_allowed_piece(target):
    present = present_target(target)
    assert is_allowed(present)
    assert locate(present).__module__.startswith(DEFINED_IN)


def test_it_resumes_to_the_losses_of_the_version_that_wrote_it(former):
    for name in ("last", "best"):  # as if it had been killed before its last checkpoint
        (former / "checkpoints" / name).unlink()
    shutil.rmtree(former / "checkpoints" / "step-00000004")
    train(load(former / "config.yaml") | {"resume": str(former)}, former)
    lines = [json.loads(line) for line in (former / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 5))
    for line in lines[2:]:
        for name, expected in LOSSES["resumed"][str(line["step"])].items():
            assert line[name] == pytest.approx(expected, abs=1e-5), f"{name} at step {line['step']}"


def test_it_is_evaluated_to_its_own_validation_loss(former, judging, tmp_path):
    loss = evaluate(judging(f"run_dir={former}", "eval=[loss]"), tmp_path / "eval")
    assert loss == pytest.approx(LOSSES["evaluated"]["val/loss"], abs=1e-5)


def test_its_weights_start_another_run(former, composed, tiny, tmp_path):
    overrides = ("model.d_model=16", "model.head_dim=8", "model.num_kv_heads=2", "model.ffn.d_ff=32", "max_steps=1")
    train(composed(*tiny, *overrides, f"init_from={former}", "optimizer.lr=1e-30"), tmp_path / "next")
    weights = load_model(tmp_path / "next" / "checkpoints" / "last")
    for name, weight in load_model(former / "checkpoints" / "last").items():
        assert weights[name].allclose(weight, atol=1e-6)


def test_it_is_exported(former, tmp_path):
    pytest.importorskip("transformers")
    config = ExportConfig(
        run_dir=str(former), checkpoint="last", average=1, format="hf", out="hf", dtype="float32", tokens=16
    )
    assert (export(config) / "model.safetensors").is_file()


def test_it_is_reported(former):
    (folder,) = find_runs([former.parent])
    run = RunReader().read(folder)
    assert run.config["schedule._target_"] == "llm.scaling.schedule.cosine"
    assert run.loss == pytest.approx(LOSSES["4"]["val/loss"])
