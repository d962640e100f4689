"""`eval=[rank]` against singular values that are computed in one piece, after training and during it."""

import json

import pytest
import torch

from llm.commands.evaluate import evaluate
from llm.evals.evaluation import on_device, window_noise
from llm.ops.spectrum import spectrum
from llm.training.rebuild import rebuild
from llm.training.train import train


def test_the_measures_are_those_of_the_whole_matrices(trained, judging, tmp_path):
    folder, _ = trained
    evaluate(judging(f"run_dir={folder}", "eval=[rank]", "eval.rank.batches=1"), tmp_path)
    found = json.loads((tmp_path / "rank.json").read_text())
    run = rebuild(folder, "last")
    model, name = run.module.model, "layers.1.ffn.down_proj"
    assert len(found) == 14  # seven projections in each of two layers
    weight = spectrum(torch.linalg.svdvals(model.get_submodule(name).weight.detach().double()))
    assert found[name]["weight"] == pytest.approx(weight._asdict(), rel=1e-6)

    inputs = []
    model.get_submodule(name).register_forward_pre_hook(lambda _m, x: inputs.append(x[0].flatten(0, 1).detach()))
    batch = on_device(next(iter(run.data.validation_batches())), run.device)
    inputs_of_model = run.module.objective.prepare(model, batch, window_noise(0, batch)).inputs
    scores = model.logits(model(**inputs_of_model).hidden)
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten()).backward()
    activation = spectrum(torch.linalg.svdvals(inputs[0].double()))
    assert found[name]["activation"] == pytest.approx(activation._asdict(), rel=1e-4)
    gradient = spectrum(torch.linalg.svdvals(model.get_submodule(name).weight.grad.double()))
    assert found[name]["gradient"] == pytest.approx(gradient._asdict(), rel=1e-4)


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_run_measures_it_after_validations_and_trains_as_without(composed, tiny, tmp_path, model):
    kept = [t for t in tiny if not t.startswith("model.ffn")]
    given = (*kept, f"model={model}", "model.ffn.d_ff=48", "max_steps=4", "val_every=2", "callbacks.samples=null")
    losses = {}
    for name, extra in (("with", ["eval=[rank]", "eval.rank.batches=1"]), ("without", [])):
        train(composed(*given, *extra), tmp_path / name)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["train/loss"] for row in rows]
    assert losses["with"] == losses["without"]
    lines = (tmp_path / "with/eval/rank.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    assert 0 < json.loads(lines[0])["found"]["layers.0.attention.q_proj"]["gradient"]["entropy"] < 1
