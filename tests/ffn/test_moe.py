import pytest
import torch
from catalogue import options
from torch.utils.checkpoint import checkpoint

from llm.errors import CheckpointError, ConfigError
from llm.model.ffn.expert_counts import expert_counts
from llm.model.ffn.experts import loop_over_tokens
from llm.model.ffn.swiglu import SwiGLU
from llm.run_folder.checkpoint import compare_state

CHOICES = [("sigmoid", balance) for balance in options("model/ffn/balance") if balance != "budget"] + [
    ("softmax", "aux_loss"),
    ("softmax", "loss_free"),
    ("threshold", "budget"),
]


@pytest.fixture
def build_moe(build_ffn):
    def build(*overrides, d_model=16, d_ff=24):
        return build_ffn("moe", f"d_ff={d_ff}", *overrides, d_model=d_model)

    return build


def test_every_router_and_every_balance_is_tried():
    assert {router for router, _ in CHOICES} == set(options("model/ffn/router"))
    assert {balance for _, balance in CHOICES} == set(options("model/ffn/balance"))


@pytest.mark.parametrize(("router", "balance"), CHOICES)
@pytest.mark.parametrize("num_shared", [0, 1])
def test_a_layer_equals_its_definition(build_moe, router, balance, num_shared):
    moe = build_moe(f"router={router}", f"balance={balance}", "match=none", f"num_shared_experts={num_shared}").double()
    x = torch.randn(3, 21, 16, dtype=torch.float64)
    tokens = x.flatten(0, 1)
    routing = moe.router(tokens, moe.balance.selection_bias())
    expected = loop_over_tokens(tokens, routing, moe.experts).view_as(x)
    if num_shared:
        expected = expected + moe.shared(x).hidden
    # sums in another order, in fp64
    torch.testing.assert_close(moe(x).hidden, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("router", "balance"), CHOICES)
def test_each_token_is_computed_independently(build_moe, router, balance):
    moe = build_moe(f"router={router}", f"balance={balance}").double().eval()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    whole = moe(x).hidden
    for row in range(2):
        for token in range(9):
            alone = moe(x[row : row + 1, token : token + 1]).hidden
            torch.testing.assert_close(alone[0, 0], whole[row, token], rtol=1e-10, atol=1e-12)  # fp64 rounding


def test_one_expert_with_top_k_of_one_equals_the_dense_layer(build_moe):
    moe = build_moe("num_experts=1", "top_k=1", "router=softmax", d_model=16, d_ff=24).double()
    dense = SwiGLU(d_model=16, d_ff=24).double()
    names = ("gate_proj", "up_proj", "down_proj")
    with torch.no_grad():
        for name in names:
            getattr(dense, name).weight.copy_(getattr(moe.experts, name).weight[0])
    x = torch.randn(2, 33, 16, dtype=torch.float64, requires_grad=True)
    (expected, actual) = (dense(x).hidden, moe(x).hidden)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)  # fp64 rounding
    grad = torch.randn_like(x)
    truth = torch.autograd.grad(expected, [x, *(getattr(dense, n).weight for n in names)], grad)
    found = torch.autograd.grad(actual, [x, *(getattr(moe.experts, n).weight for n in names)], grad)
    for value, correct in zip(found, truth, strict=True):
        torch.testing.assert_close(value.squeeze(0) if value.ndim != x.ndim else value.view_as(correct), correct)


@pytest.mark.parametrize(("router", "balance"), CHOICES)
def test_forward_changes_no_state(build_moe, router, balance):
    moe = build_moe(f"router={router}", f"balance={balance}")
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    moe(torch.randn(2, 9, 16)).hidden.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in moe.state_dict().items())


@pytest.mark.parametrize(("router", "balance"), CHOICES)
def test_counts_are_exact_and_the_same_under_activation_checkpointing(build_moe, router, balance):
    moe = build_moe(f"router={router}", f"balance={balance}")
    x = torch.randn(2, 17, 16, requires_grad=True)
    plain = moe(x)
    recomputed = checkpoint(moe, x, use_reentrant=False)
    assert recomputed is not None
    recomputed.hidden.sum().backward()
    routing = moe.router(x.flatten(0, 1), moe.balance.selection_bias())
    counts = expert_counts(routing.expert_ids, 8)
    for out in (plain, recomputed):
        assert torch.equal(out.metrics["stat/expert_counts"], counts)
        assert int(out.metrics["stat/num_tokens"]) == 34


@pytest.mark.parametrize("balance", ["loss_free", "quantile", "none"])
def test_without_auxiliary_loss_the_router_gets_only_the_gradient_of_the_model(build_moe, balance):
    moe = build_moe(f"balance={balance}")
    out = moe(torch.randn(2, 9, 16))
    assert out.losses == {}
    (gradient,) = torch.autograd.grad(out.hidden.square().sum(), moe.router.proj.weight)
    assert gradient.abs().sum() > 0
    assert not any(value.requires_grad for value in out.metrics.values())


def test_an_auxiliary_loss_has_a_gradient_for_the_router_alone(build_moe):
    moe = build_moe("balance=aux_loss", "z_loss=0.001")
    out = moe(torch.randn(2, 9, 16))
    assert set(out.losses) == {"load_balance_loss", "z_loss"}
    torch.stack(list(out.losses.values())).sum().backward()
    reached = {name for name, p in moe.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"router.proj.weight"}


def test_the_z_loss_equals_its_formula(build_moe):
    moe = build_moe("z_loss=0.5")
    x = torch.randn(2, 9, 16)
    logits = x.flatten(0, 1) @ moe.router.proj.weight.t()
    expected = 0.5 * logits.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(moe(x).losses["z_loss"], expected)


def test_the_bias_does_not_change_outputs_unless_it_changes_the_choice(build_moe):
    moe = build_moe().double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    before = moe(x).hidden
    moe.balance.bias.fill_(0.25)
    torch.testing.assert_close(moe(x).hidden, before, rtol=1e-10, atol=1e-12)  # fp64 rounding
    moe.balance.bias.copy_(torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0, 0]))
    assert not torch.allclose(moe(x).hidden, before)


def test_no_metric_or_loss_is_added_outside_training(build_moe):
    moe = build_moe("balance=aux_loss", "z_loss=0.1").eval()
    out = moe(torch.randn(2, 9, 16))
    assert out.losses == {}
    assert out.metrics == {}


def test_logged_figures_equal_their_definitions(build_moe):
    moe = build_moe("num_experts=32", "top_k=2")
    out = moe(torch.randn(1, 20, 16))
    counts = out.metrics["stat/expert_counts"].float()
    assert int(counts.sum()) == 40
    assert torch.equal(out.metrics["expert_load"], counts / 40)
    assert float(out.metrics["max_violation"]) == pytest.approx(float(counts.max() / counts.mean() - 1))
    assert float(out.metrics["dead_experts"]) == int((counts == 0).sum()) > 0
    assert float(out.metrics["top_expert_share"]) == float(counts.max() / 40)
    assert float(out.metrics["experts_per_token"]) == 2.0
    assert 0 < float(out.metrics["router_entropy"]) < float(torch.tensor(32.0).log())


def test_normalised_outputs_make_the_gate_weight_the_size_of_a_contribution(build_moe):
    moe = build_moe("normalize_outputs=true", "top_k=1", "router.normalize=false")
    x = torch.randn(20, 16)
    expected = moe.router(x, moe.balance.selection_bias()).gate_weights[:, 0]
    # the epsilon of 1e-6 beside a mean square of order 1
    torch.testing.assert_close(moe(x[None]).hidden[0].square().mean(-1).sqrt(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["top_k=9"], r"model\.ffn\.top_k=9: must lie in \[1, model\.ffn\.num_experts=8\]; try 8"),
        (["top_k=0"], r"model\.ffn\.top_k=0: .*try 1"),
        (["num_experts=0"], r"model\.ffn\.num_experts=0: must be at least 1"),
        (["num_shared_experts=-1"], r"model\.ffn\.num_shared_experts=-1"),
        (["z_loss=-1"], r"model\.ffn\.z_loss=-1: must be at least 0"),
        (["top_k=7"], r"match=active: .*not a whole width; try top_k=6 or 8"),
        (["router=threshold"], r"LossFree: does not support ThresholdRouter; use model/ffn/balance=budget"),
        (["balance=budget"], r"Budget: does not support TopKRouter"),
    ],
)
def test_settings_that_cannot_work_are_refused(build_moe, overrides, message):
    with pytest.raises(ConfigError, match=message):
        build_moe(*overrides)


def test_a_checkpoint_with_another_number_of_experts_is_refused(build_moe):
    state = build_moe("num_experts=4").state_dict()
    with pytest.raises(CheckpointError, match=r"experts\.\w+_proj\.weight"):
        compare_state(state, build_moe().state_dict(), source="checkpoint")


def test_the_balancing_state_survives_a_checkpoint(build_moe):
    moe, other = build_moe(), build_moe()
    moe.balance.after_optimizer_step({"expert_counts": torch.arange(8)})
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other.balance.bias, moe.balance.bias)
    assert other.balance.bias.abs().sum() > 0


def test_flops_count_active_experts_only(build_moe):
    moe = build_moe("num_experts=8", "top_k=2", "num_shared_experts=1", "match=none", d_model=16, d_ff=24)
    assert moe.flops_per_token(128) == 2 * 16 * 8 + 6 * 16 * 24 * 2 + 6 * 16 * 24


def test_experts_with_bounded_units_log_the_largest_of_routed_and_shared_ones(build_moe):
    bounds = ("activation=situ", "gate_cap=0.5", "up_cap=1.0", "match=none", "num_shared_experts=1")
    largest = build_moe(*bounds).train()(50 * torch.randn(2, 9, 16)).metrics["hidden_max"]
    assert 0.4 < largest <= 0.5
    assert "hidden_max" not in build_moe().train()(torch.randn(2, 9, 16)).metrics
