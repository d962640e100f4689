from typing import Any, get_args

import pytest
import torch

from llm.errors import ConfigError
from llm.model.ffn.router import TopKRouter
from llm.model.ffn.scores import Scores, auto_routed_scale
from llm.model.ffn.threshold_router import ThresholdRouter


def make_router(*, num_experts=8, top_k=3, scores: Any = "sigmoid", normalize=True, routed_scale: Any = 1.0):
    return TopKRouter(
        d_model=16,
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=0,
        scores=scores,
        normalize=normalize,
        routed_scale=routed_scale,
    )


@pytest.mark.parametrize("scores", get_args(Scores))
def test_the_experts_chosen_are_those_with_the_highest_scores(scores):
    router = make_router(scores=scores, normalize=False)
    routing = router(torch.randn(50, 16), None)
    every_score = router.score(routing.logits)
    expected = every_score.gather(-1, routing.logits.topk(3).indices)
    assert torch.equal(routing.gate_weights, expected)


def test_normalised_weights_sum_to_the_routed_scale():
    routing = make_router(routed_scale=2.5)(torch.randn(50, 16), None)
    torch.testing.assert_close(routing.gate_weights.sum(-1), torch.full((50,), 2.5))


def test_a_bias_changes_the_choice_and_never_the_weights():
    router = make_router(normalize=False)
    x = torch.randn(50, 16)
    bias = torch.zeros(8)
    bias[5] = 10.0
    routing = router(x, bias)
    assert (routing.expert_ids == 5).any(-1).all()
    assert torch.equal(routing.gate_weights, routing.logits.sigmoid().gather(-1, routing.expert_ids))


def test_a_bias_that_does_not_change_the_choice_changes_nothing():
    router = make_router()
    x = torch.randn(50, 16)
    plain, shifted = router(x, torch.zeros(8)), router(x, torch.full((8,), 0.0625))
    assert torch.equal(plain.expert_ids.sort().values, shifted.expert_ids.sort().values)
    # a token's weights add up in the order of its experts, which rounding may change
    torch.testing.assert_close(plain.gate_weights.sort().values, shifted.gate_weights.sort().values)


def test_logits_are_fp32_under_autocast():
    router = make_router()
    x = torch.randn(50, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x, None).logits, router(x, None).logits)
        inside = router(x, None).logits
    assert inside.dtype == torch.float32
    assert torch.equal(inside, router(x, None).logits)


def test_scale_auto_equals_the_published_values_of_two_large_models():
    # DeepSeek-V2 sets 16 and Su derives 15.99; for V3 Su derives 2.827. One per mille: the average over 4096 draws.
    v2 = auto_routed_scale(num_experts=160, top_k=6, num_shared_experts=2, scores="softmax", normalize=False)
    v3 = auto_routed_scale(num_experts=256, top_k=8, num_shared_experts=1, scores="sigmoid", normalize=True)
    assert v2 == pytest.approx(15.99, rel=2e-3)
    assert v3 == pytest.approx(2.827, rel=1e-3)


def test_one_normalised_expert_is_refused():
    with pytest.raises(ConfigError, match=r"normalize=true: with top_k=1 .* no gradient"):
        make_router(top_k=1)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_above_zero_is_refused(scale):
    with pytest.raises(ConfigError, match=r"model\.ffn\.router\.routed_scale="):
        make_router(routed_scale=scale)


def make_threshold_router(*, max_experts=None, normalize=False):
    return ThresholdRouter(
        d_model=16,
        num_experts=8,
        top_k=2,
        num_shared_experts=0,
        max_experts=max_experts,
        normalize=normalize,
        routed_scale=1.0,
    )


def test_a_threshold_router_fills_a_slot_for_each_score_above_its_threshold():
    router = make_threshold_router()
    bias = torch.linspace(-0.8, -0.4, 8)
    routing = router(torch.randn(64, 16), bias)
    wanted = routing.logits.sigmoid() + bias > 0
    assert not wanted.any(-1).all()
    assert wanted.sum(-1).unique().numel() > 2
    chosen = torch.zeros(64, 9, dtype=torch.bool).scatter_(1, routing.expert_ids, torch.ones(64, 8, dtype=torch.bool))
    assert torch.equal(chosen[:, :8], wanted)
    is_empty = routing.expert_ids == 8
    assert (routing.gate_weights[is_empty] == 0).all()
    assert (routing.gate_weights[~is_empty] > 0).all()


def test_beyond_the_cap_the_experts_with_the_highest_scores_are_kept():
    router = make_threshold_router(max_experts=3)
    routing = router(torch.randn(64, 16), torch.ones(8))
    best = routing.logits.topk(3).indices
    assert torch.equal(routing.expert_ids.sort().values, best.sort().values)


def test_a_token_without_an_expert_gets_weights_of_zero_and_finite_gradients():
    router = make_threshold_router(normalize=True)
    x = torch.randn(10, 16, requires_grad=True)
    routing = router(x, torch.full((8,), -2.0))
    assert (routing.expert_ids == 8).all()
    assert (routing.gate_weights == 0).all()
    routing.gate_weights.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("max_experts", [1, 9])
def test_a_cap_out_of_range_is_refused(max_experts):
    with pytest.raises(ConfigError, match=rf"max_experts={max_experts}: must lie between .*top_k=2 .*num_experts=8"):
        make_threshold_router(max_experts=max_experts)
