"""Routed experts in a latent space: their definition, their sizes, and settings that its norm makes meaningless."""

import pytest
import torch
import torch.nn.functional as F

from llm.errors import ConfigError
from llm.model.ffn.experts import RMS_EPSILON, loop_over_tokens

SIZES = ("num_experts=8", "top_k=3", "latent=8")


@pytest.fixture
def build_latent(build_ffn):
    return lambda *overrides: build_ffn("moe", "d_ff=48", *SIZES, *overrides, d_model=16)


@pytest.mark.parametrize("num_shared", [0, 1])
def test_a_layer_equals_its_definition(build_latent, num_shared):
    moe = build_latent("match=none", f"num_shared_experts={num_shared}").double()
    x = torch.randn(3, 21, 16, dtype=torch.float64)
    tokens = x.flatten(0, 1)
    routing = moe.router(tokens, moe.balance.selection_bias())
    inner = loop_over_tokens(moe.latent_in_proj(tokens), routing, moe.experts)
    expected = moe.latent_out_proj(F.rms_norm(inner, (8,), moe.latent_norm.weight, RMS_EPSILON)).view_as(x)
    if num_shared:
        expected = expected + moe.shared(x).hidden
    torch.testing.assert_close(moe(x).hidden, expected, rtol=1e-10, atol=1e-12)


def test_the_scale_of_all_gates_changes_nothing_and_their_ratios_get_a_gradient(build_latent):
    moe = build_latent("match=none").double()
    assert moe.router.routed_scale == 1
    x = 30 * torch.randn(1, 40, 16, dtype=torch.float64)  # the epsilon of the norm is then far below the sums
    before = moe(x).hidden
    moe.router.routed_scale = 3.0
    torch.testing.assert_close(moe(x).hidden, before, rtol=1e-4, atol=1e-5)
    moe(x).hidden.square().sum().backward()
    assert moe.router.proj.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize(("match", "shared"), [("active", 0), ("active", 1), ("total", 0), ("total", 2), ("flops", 1)])
def test_widths_are_matched_with_both_projections_and_counts_equal_a_count_by_hand(build_latent, match, shared):
    moe = build_latent(f"match={match}", f"num_shared_experts={shared}")
    width, used = moe.d_expert, 8 if match == "total" else 3
    router = 16 * 8 if match == "flops" else 0
    weights = 3 * width * (8 * used + 16 * shared) + 2 * 16 * 8 + router
    one_more = 3 * (8 * used + 16 * shared)
    assert weights <= 3 * 16 * 48 < weights + one_more
    total = 3 * width * (8 * 8 + 16 * shared) + 2 * 16 * 8 + 16 * 8 + 8
    assert sum(p.numel() for p in moe.parameters()) == total
    assert moe.flops_per_token(64) == 2 * (3 * width * (8 * 3 + 16 * shared) + 2 * 16 * 8 + 16 * 8)


def test_a_token_without_an_expert_gets_zero(build_ffn):
    moe = build_ffn("moe", "d_ff=48", *SIZES, "router=threshold", "balance=budget", "match=none", d_model=16)
    moe.balance.bias.fill_(-2.0)  # no score exceeds the threshold
    assert not moe(torch.randn(1, 5, 16)).hidden.any()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("latent=17",), r"latent=17: must lie in \[1, model\.d_model=16\]"),
        (("top_k=1", "router=softmax"), r"top_k=1: the norm of model\.ffn\.latent=8 removes the only gate weight"),
        (("normalize_outputs=true",), r"normalize_outputs=true: model\.ffn\.latent=8 has a norm"),
        (("latent=16", "match=flops", "d_ff=11"), r"match=flops: d_ff=11 leaves no width"),
    ],
)
def test_a_setting_without_meaning_is_refused(build_latent, overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        build_latent(*overrides)
