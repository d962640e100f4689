"""Next-token prediction is what it was before there were objectives, bit for bit."""

import pytest
import torch

from llm.config.build import build_model, build_objective
from llm.config.check import check
from llm.contracts import IGNORED_LABEL, LossShare
from llm.errors import ConfigError
from llm.objective.next_token import NextToken
from llm.ops.loss import reference_linear_cross_entropy
from llm.ops.noise import KeyedNoise

BOS = 63


@pytest.fixture
def model(composed, tiny):
    return build_model(composed(*tiny), 64)


def batch_of(time=32, rows=3):
    ids = torch.randint(0, 63, (rows, time + 1), generator=torch.Generator().manual_seed(1))
    ids[:, [0, 11, 20]] = BOS
    starts = ids[:, :-1] == BOS
    places = torch.arange(time).expand(rows, -1)
    positions = places - places.masked_fill(~starts, 0).cummax(1).values
    return {
        "input_ids": ids[:, :-1],
        "labels": ids[:, 1:],
        "positions": positions,
        "document_ids": starts.long().cumsum(1),
    }


def noise(batch):
    return KeyedNoise(0, 0, torch.arange(len(batch["input_ids"])))


@pytest.mark.parametrize("share", [LossShare(None, 2), LossShare(80, 4)])
def test_loss_and_gradients_have_the_same_bits_as_without_the_seam(model, share):
    batch, objective = batch_of(), NextToken(vocab_size=64, bos_id=BOS)
    prepared = objective.prepare(model, batch, noise(batch))
    loss, metrics = objective.loss(model, model, prepared, model(**prepared.inputs), share)
    found = torch.autograd.grad(loss, [*model.parameters()])
    hidden = model(batch["input_ids"], positions=batch["positions"], document_ids=batch["document_ids"]).hidden
    if share.num_labels is None:
        expected = model.loss(hidden, batch["labels"])
    else:
        expected = model.loss(hidden, batch["labels"], reduction="sum") * (share.num_parts / share.num_labels)
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, found, torch.autograd.grad(expected, [*model.parameters()])))
    assert metrics == {}


def test_a_configuration_without_an_objective_predicts_the_next_token(composed, tiny):
    cfg = composed(*tiny)
    del cfg["objective"]
    check(cfg)
    assert isinstance(build_objective(cfg, vocab_size=5, bos_id=0), NextToken)


def test_the_compared_figure_gives_bos_no_probability_and_scores_the_shared_columns(model):
    batch, objective = batch_of(), NextToken(vocab_size=64, bos_id=BOS)
    found = objective.token_nll(model, model, batch, noise(batch), sample=0, samples=1)
    hidden = model(batch["input_ids"], positions=batch["positions"], document_ids=batch["document_ids"]).hidden
    scores = model.logits(hidden).detach()
    scores[..., BOS] = -torch.inf
    labels = batch["labels"].clone()
    labels[:, -1] = IGNORED_LABEL
    labels[labels == BOS] = IGNORED_LABEL
    assert torch.equal(found.labels, labels)
    exact = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(found.nats.flatten(), exact, atol=1e-5, rtol=1e-5)
    every = objective.validation_nll(model, model, batch, noise(batch))
    own = reference_linear_cross_entropy(hidden, model.lm_head.weight, batch["labels"], reduction="none")
    torch.testing.assert_close(every.nats, own.detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(every.labels, batch["labels"])


def test_a_number_of_passes_is_refused(model):
    objective = NextToken(vocab_size=64, bos_id=BOS)
    with pytest.raises(ConfigError, match="steps=4: objective=next_token takes one pass per token; set steps=null"):
        objective.decode(model, [[BOS]], max_new_tokens=2, steps=4, temperature=0.0, top_k=None, top_p=None, seed=0)
