import pytest

from llm.errors import ConfigError
from llm.model.ffn.sizing import expert_width


def width(match, *, d_ff=384, num_experts=8, top_k=2, num_shared_experts=0):
    return expert_width(
        match=match,
        d_model=128,
        d_ff=d_ff,
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=num_shared_experts,
    )


def test_active_gives_a_token_the_weights_of_the_dense_layer():
    assert width("active") == 192
    assert width("active", top_k=3, num_shared_experts=1) == 96


def test_total_shares_the_dense_layer_among_all_experts():
    assert width("total") == 48
    assert width("total", num_experts=7, num_shared_experts=1) == 48


def test_none_makes_experts_as_wide_as_the_dense_layer():
    assert width("none") == 384


@pytest.mark.parametrize("num_experts", [8, 64])
@pytest.mark.parametrize("num_shared_experts", [0, 1])
def test_flops_is_the_widest_that_costs_no_more_than_the_dense_layer(num_experts, num_shared_experts):
    def cost(d_expert):
        return 2 * 128 * num_experts + 6 * 128 * d_expert * (2 + num_shared_experts)

    best = width("flops", num_experts=num_experts, num_shared_experts=num_shared_experts)
    assert cost(best) <= 6 * 128 * 384 < cost(best + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"match": "active", "top_k": 5},
            r"match=active: d_ff=384 shared by 5 experts \(top_k=5, .*try top_k=4 or 6, or d_ff=380 or 385",
        ),
        (
            {"match": "total", "num_experts": 10},
            r"match=total: d_ff=384 shared by 10 experts .*try num_experts=8 or 12, or d_ff=380 or 390",
        ),
        ({"match": "total", "d_ff": 4}, r"d_ff=4 shared by 8 experts .*try num_experts=2 or 4, or d_ff=8$"),
        ({"match": "flops", "num_experts": 1200}, r"match=flops: d_ff=384 leaves no width .*lower num_experts"),
    ],
)
def test_a_width_that_is_zero_or_fractional_is_refused_with_the_nearest_valid_ones(settings, message):
    with pytest.raises(ConfigError, match=message):
        width(**settings)
