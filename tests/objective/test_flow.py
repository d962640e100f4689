"""The flow: its bound is the entropy under the exact denoiser, and its steps follow the differential equation."""

import math

import pytest
import torch
from flow_tables import FLOW_BOS, SYMBOLS, ExactDenoiser
from parameter_parts import Parts

from llm.config.build import build_model, build_objective
from llm.contracts import WHOLE_UPDATE
from llm.errors import ConfigError
from llm.objective.flow_text import FlowText
from llm.objective.gaussian_path import path_of
from llm.objective.token_flow import TokenFlow
from llm.ops.noise import KeyedNoise

SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": None, "seed": 0}


def flow(**settings):
    options = {"loc": "auto", "scale": 1.0, "evidence": True, "samples": 24, "steps": 8} | settings
    return TokenFlow(vocab_size=SYMBOLS + 1, bos_id=FLOW_BOS, **options)


def batch_of(ids):
    labels = torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], 1)
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    return {"input_ids": ids, "labels": labels, "positions": positions, "document_ids": torch.zeros_like(ids)}


def test_the_bound_is_the_entropy_under_the_exact_denoiser():
    model, objective, rows = ExactDenoiser(), flow(), 20_000
    batch = batch_of(model.pairs(rows))
    found = [
        objective.token_nll(model, model, batch, KeyedNoise(0, k, torch.arange(rows)), sample=k, samples=24)
        for k in range(24)
    ]
    sums = torch.stack([f.nats.sum(1) for f in found]).mean(0)
    cross = -model.joint[batch["input_ids"][:, 1], batch["input_ids"][:, 2]].log()
    gap = sums - cross  # what the choice of pairs adds to both is removed
    error = float(gap.std() / math.sqrt(rows))
    assert error < 0.02
    # the first term of the bound is 0.01 nats per token where less is lost
    assert -4 * error < float(gap.mean()) < 0.02 + 4 * error
    assert float(cross.mean()) == pytest.approx(model.entropy(), abs=0.02)


def drawn(steps, rows=4000, **settings):
    model = ExactDenoiser()
    prompts = [[FLOW_BOS]] * rows
    text = flow(**settings).decode(model, prompts, max_new_tokens=2, steps=steps, **SAMPLING)
    tokens = torch.cat(list(text), 1)
    return model.joint, torch.bincount(tokens[:, 0] * SYMBOLS + tokens[:, 1], minlength=SYMBOLS**2) / rows


def test_many_steps_draw_from_the_joint_and_one_step_draws_each_token_alone():
    joint, shares = drawn(64)
    # 4000 draws over 16 pairs differ from their distribution by about 0.025
    assert float((shares - joint.flatten()).abs().sum()) / 2 < 0.05
    product = joint.sum(1)[:, None] * joint.sum(0)
    _, alone = drawn(1)
    assert float((alone - product.flatten()).abs().sum()) / 2 < 0.05
    assert float((product - joint).abs().sum()) / 2 > 0.1


def test_the_trajectory_is_the_product_of_one_in_the_space_of_one_hot_vectors():
    model, steps = ExactDenoiser(), 12
    text = flow().decode(model, [[FLOW_BOS]] * 3, max_new_tokens=2, steps=steps, **SAMPLING)
    seen = []
    text._predict = lambda vectors, *rest, own=text._predict: seen.append(vectors.clone()) or own(vectors, *rest)
    list(text)
    levels = [0.0, *torch.sigmoid(text.log_snr[1:] / 2).tolist()]
    fresh = FlowText(
        model,
        [[FLOW_BOS]] * 3,
        steps=steps,
        path=text.path,
        evidence=True,
        bos_id=FLOW_BOS,
        max_new_tokens=2,
        **SAMPLING,
    )
    noise = torch.randn(3, 2, 4, generator=fresh.generator).double()
    one_hot = noise @ torch.linalg.pinv(model.table)
    times = torch.full((3, 3, 1), text.path.highest)
    for index, t in enumerate(levels):
        x = one_hot @ model.table
        vectors = torch.cat([model.table[FLOW_BOS].expand(3, 1, 4), x / math.sqrt((1 - t) ** 2 + t**2)], 1)
        torch.testing.assert_close(seen[index], vectors, rtol=1e-7, atol=1e-9)
        if index + 1 < steps:
            times[:, 1:] = float(text.log_snr[index])
            p = fresh._predict(vectors, times, t / (1 - t) ** 2 * x, model.table)
            one_hot = one_hot + (levels[index + 1] - t) / (1 - t) * (p - one_hot)


def test_the_loss_is_the_cross_entropy_of_the_posterior(composed, tiny):
    cfg = composed(*tiny, "objective=flow")
    model, batch = build_model(cfg, 64).double(), batch_of(torch.randint(63, (3, 16)))
    objective = build_objective(cfg, vocab_size=64, bos_id=63)
    prepared = objective.prepare(model, batch, KeyedNoise(0, 0, torch.arange(3)))
    out = model(**prepared.inputs)
    table = torch.nn.functional.normalize(model.token_embedding.weight, dim=1) * math.sqrt(model.d_model)
    snr = prepared.targets["log_snr"].exp()[..., None]
    noisy = prepared.inputs["embedded"] * (1 + snr).sqrt()
    scores = model.logits(out.hidden) + snr.sqrt() * noisy @ table.T
    nats = -scores.log_softmax(-1).gather(-1, batch["input_ids"][..., None])[..., 0]
    loss, _ = objective.loss(model, model, prepared, out, WHOLE_UPDATE)
    torch.testing.assert_close(loss, nats[:, 1:].mean())
    torch.testing.assert_close(prepared.inputs["embedded"][:, 0], table[batch["input_ids"][:, 0]])


def test_levels_of_training_are_logistic_around_the_place_where_half_the_information_is_lost():
    path = path_of(ExactDenoiser(), "auto", 2.0)
    assert path.loc == pytest.approx(math.log(math.log(5) / 4))
    shares = torch.tensor([0.0, 0.5, 1.0])
    expected = [path.loc - 2 * math.log(49), path.loc, path.loc + 2 * math.log(49)]
    assert path.quantiles(shares).tolist() == pytest.approx(expected, rel=1e-5)


def test_no_parameter_is_read_while_it_is_not_gathered(composed, tiny):
    cfg = composed(*tiny, "objective=flow")
    model, batch = build_model(cfg, 64), batch_of(torch.randint(63, (2, 8)))
    objective = build_objective(cfg, vocab_size=64, bos_id=63)
    noise = KeyedNoise(0, 0, torch.arange(2))

    @torch.no_grad()
    def answers():
        prepared = objective.prepare(model, batch, noise)
        loss, _ = objective.loss(model, model, prepared, model(**prepared.inputs), WHOLE_UPDATE)
        return loss, objective.validation_nll(model, model, batch, noise).nats

    expected = answers()
    Parts(model)
    torch.testing.assert_close(answers(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loc": "middle"}, "objective.loc=middle"),
        ({"loc": math.inf}, "objective.loc=inf"),
        ({"scale": 0.0}, "objective.scale=0.0"),
        ({"samples": 0}, "objective.samples=0"),
        ({"steps": 0}, "objective.steps=0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        flow(**settings)
