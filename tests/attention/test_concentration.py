"""Concentration of attention, against rows whose measure is known."""

import math

import pytest
import torch
from attention_pairs import VALID_PAIRS, build_pair

from llm.config.build import build_model
from llm.model.attention.concentration import concentration, concentration_by_layer


def test_an_even_row_and_a_row_on_one_key_are_the_two_ends():
    time = 32
    visible = torch.ones(1, time, time, dtype=torch.bool).tril()
    even = visible[:, None].float() / visible.sum(-1)[:, None, :, None]
    alone = torch.eye(time)[None, None]
    counts = torch.arange(1, time + 1).double()
    for sign in (1, -1):
        spread, single = concentration(sign * even, visible), concentration(sign * alone, visible)
        torch.testing.assert_close(spread["sparsity"][0, 0], torch.ones(time, dtype=torch.float64))
        torch.testing.assert_close(spread["effective_keys"][0, 0], counts)
        torch.testing.assert_close(spread["entropy"][0, 0], counts.log())
        torch.testing.assert_close(single["sparsity"][0, 0], counts.rsqrt())
        torch.testing.assert_close(single["effective_keys"][0, 0], torch.ones(time, dtype=torch.float64))
        torch.testing.assert_close(single["entropy"][0, 0], torch.zeros(time, dtype=torch.float64))


def test_softmax_over_normal_scores_has_the_concentration_of_its_theory():
    """Scores N(0, γ²): sparsity = E[e^s] / sqrt(E[e^2s]) = e^(−γ²/2) (kexue.fm/archives/9889)."""
    scores = 0.8 * torch.randn(1, 1, 1, 200_000, dtype=torch.float64)
    visible = torch.ones(1, 1, 200_000, dtype=torch.bool)
    measured = float(concentration(scores.softmax(-1), visible)["sparsity"])
    assert abs(measured - math.exp(-0.32)) < 0.01  # the second moment of 200 000 draws scatters by half a percent


@pytest.mark.parametrize(("attention", "position"), VALID_PAIRS, ids=map("-".join, VALID_PAIRS))
def test_weights_of_pairs_mix_to_what_attention_returns_and_stay_inside_documents(attention, position, rows):
    layer = build_pair(attention, position).eval()
    x, positions, ids = rows(60)
    q, k, v = layer.project(x, document_ids=ids)
    gates = layer.gates(x)
    weights = layer.pair_weights(q, k, positions=positions, document_ids=ids, **gates)
    hidden = (ids[:, :, None] != ids[:, None, :]) | torch.ones(60, 60, dtype=torch.bool).triu(1)
    assert not weights.masked_select(hidden[:, None]).any()
    fast = layer.attend(q, k, v, positions=positions, document_ids=ids, cache=None, **gates)[0]
    slow = layer.reference_attend(q, k, v, positions=positions, document_ids=ids, **gates)
    torch.testing.assert_close(fast, slow, atol=2e-5, rtol=2e-4)  # fp32 sums in another order


def test_every_layer_is_reported(composed):
    model = build_model(composed("model/attention=linear", "context_length=64"), 100).eval()
    ids, positions = torch.randint(100, (2, 64)), torch.arange(64).expand(2, -1)
    reports = concentration_by_layer(model, ids, positions=positions, document_ids=None)
    assert len(reports) == len(model.layers)
    for report in reports:
        assert 0 < report["sparsity"] <= 1
        assert 1 <= report["effective_keys"] <= 64
        assert 0 <= report["entropy"] <= math.log(64)
    assert not model.layers[0].attention._forward_pre_hooks
