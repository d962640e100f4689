"""The contract of objectives, held against every option of conf/objective."""

import pytest
import torch
from catalogue import options

from llm.config.build import build_model, build_objective
from llm.contracts import IGNORED_LABEL, WHOLE_UPDATE, LossShare, Objective
from llm.objective.scoring import scored_tokens
from llm.ops.noise import KeyedNoise

NEEDS = {"block": ("objective.block_length=4",)}
NAMES = options("objective")
VOCABULARY, BOS = 64, 63


@pytest.fixture(params=NAMES)
def pair(request, composed, tiny):
    """A small decoder in fp64 and the objective that it is trained on."""
    cfg = composed(*tiny, f"objective={request.param}", *NEEDS.get(request.param, ()))
    model = build_model(cfg, VOCABULARY).double()
    return model, build_objective(cfg, vocab_size=VOCABULARY, bos_id=BOS)


def batch_of(rows=4, time=24):
    ids = torch.randint(0, VOCABULARY - 1, (rows, time + 1), generator=torch.Generator().manual_seed(1))
    ids[:, [0, 10]] = BOS
    starts = ids[:, :-1] == BOS
    places = torch.arange(time).expand(rows, -1)
    positions = places - places.masked_fill(~starts, 0).cummax(1).values
    labels = ids[:, 1:].clone()
    labels[:, 4] = IGNORED_LABEL
    documents = starts.long().cumsum(1)
    return {"input_ids": ids[:, :-1], "labels": labels, "positions": positions, "document_ids": documents}


def part_of(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def loss_of(model, objective, batch, rows, share=WHOLE_UPDATE):
    prepared = objective.prepare(model, batch, KeyedNoise(0, 0, rows))
    out = model(**prepared.inputs)
    return objective.loss(model, model, prepared, out, share)[0]


def test_it_is_an_objective_of_its_name(pair):
    model, objective = pair
    assert isinstance(objective, Objective)
    assert objective.name in NAMES
    assert objective.flops_per_token(model, 24) >= model.flops_per_token(24)
    model.check_sight(objective.sight)


def test_inputs_are_a_function_of_batch_and_noise_and_do_not_depend_on_how_rows_are_split(pair):
    model, objective = pair
    batch, rows, before = batch_of(), torch.arange(4), torch.get_rng_state()
    whole = objective.prepare(model, batch, KeyedNoise(3, 7, rows))
    parts = [objective.prepare(model, part_of(batch, r), KeyedNoise(3, 7, r)) for r in rows.split(2)]
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in whole.inputs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, torch.cat([part.inputs[name] for part in parts])), name


def test_the_losses_of_the_parts_average_to_that_of_the_update(pair):
    model, objective = pair
    batch, rows = batch_of(), torch.arange(4)
    labels = batch["labels"][:, : None if objective.scores_last_label else -1]
    count = int((labels != IGNORED_LABEL).sum())
    whole = loss_of(model, objective, batch, rows, LossShare(count, 1))
    parts = [loss_of(model, objective, part_of(batch, r), r, LossShare(count, 2)) for r in rows.split(2)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_tokens_that_are_not_scored_carry_no_loss_and_stay_clean(pair):
    model, objective = pair
    batch, noise = batch_of(), KeyedNoise(0, 0, torch.arange(4))
    scored = scored_tokens(batch, BOS)
    assert not scored[:, [0, 5, 10]].any()
    found = objective.token_nll(model, model, batch, noise, sample=0, samples=1)
    assert found.scored.sum() == scored.sum()
    assert not found.nats[~found.scored].any()
    assert not found.nats.requires_grad
    ids = objective.prepare(model, batch, noise).inputs.get("input_ids")
    if ids is not None:
        assert torch.equal(ids[:, :24][~scored], batch["input_ids"][~scored])


def test_no_gradient_reaches_a_document_from_the_loss_of_another(pair):
    model, objective = pair
    batch = batch_of(rows=1)
    batch["labels"][:, 9:] = IGNORED_LABEL  # the loss of the first document alone
    prepared = objective.prepare(model, batch, KeyedNoise(0, 0, torch.arange(1)))
    read = []

    def keep(_, inputs):
        inputs[0].retain_grad()
        read.append(inputs[0])

    handle = model.layers[0].register_forward_pre_hook(keep)
    out = model(**prepared.inputs)
    handle.remove()
    objective.loss(model, model, prepared, out, WHOLE_UPDATE)[0].backward()
    gradient = read[0].grad.abs().sum(-1)
    inside = prepared.inputs["document_ids"] == prepared.inputs["document_ids"][0, 0]
    assert gradient[inside].any()
    assert not gradient[~inside].any()


def test_the_loss_reaches_every_parameter(pair):
    model, objective = pair
    loss_of(model, objective, batch_of(), torch.arange(4)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_noise_changes_with_the_update_and_the_seed(pair):
    model, objective = pair
    if not objective.is_bound:
        pytest.skip("nothing is drawn")
    batch, rows = batch_of(), torch.arange(4)
    noises = (KeyedNoise(0, 0, rows), KeyedNoise(0, 1, rows), KeyedNoise(1, 0, rows))
    drawn = [objective.prepare(model, batch, noise).inputs.values() for noise in noises]
    values = [torch.cat([v.flatten().double() for v in own if isinstance(v, torch.Tensor)]) for own in drawn]
    assert not torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
