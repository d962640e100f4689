import pytest
import torch

from llm.errors import ConfigError
from llm.model.ffn.balance.aux_loss import AuxLoss
from llm.model.ffn.balance.budget import Budget
from llm.model.ffn.balance.loss_free import LossFree
from llm.model.ffn.balance.quantile import Quantile
from llm.model.ffn.expert_counts import expert_counts, max_violation
from llm.model.ffn.routing import Routing

NUM_EXPERTS, TOP_K, TOKENS, STEPS, WINDOW = 32, 4, 2048, 1000, 200


def route(logits, bias, *, top_k=TOP_K, threshold=False):
    scores = logits.sigmoid()
    ranking = scores if bias is None else scores + bias
    margins, ids = ranking.topk(ranking.shape[1] if threshold else top_k)
    if threshold:
        ids = ids.masked_fill(margins <= 0, ranking.shape[1])
    return Routing(ids, torch.ones_like(margins), logits, scores / scores.sum(-1, keepdim=True))


def statistics(balance, routing):
    counts = expert_counts(routing.expert_ids, balance.num_experts)
    return {"expert_counts": counts, "num_tokens": torch.tensor(len(routing.logits)), **balance.statistics(routing)}


def run_skewed_router(balance, *, steps=STEPS, threshold=False):
    """Balance a fixed router whose experts differ by offsets from N(0, 1); return the counts of each step."""
    generator = torch.Generator().manual_seed(3)
    offsets = torch.randn(NUM_EXPERTS, generator=generator)
    history = []
    for _ in range(steps):
        logits = torch.randn(TOKENS, NUM_EXPERTS, generator=generator) + offsets
        seen = statistics(balance, route(logits, balance.selection_bias(), threshold=threshold))
        history.append(seen["expert_counts"])
        balance.after_optimizer_step(seen)
    return torch.stack(history)


def sampling_floor():
    """Mean max_violation of TOKENS x TOP_K slots spread evenly by chance: what no rule can go below."""
    draws = torch.rand(WINDOW, TOKENS, NUM_EXPERTS, generator=torch.Generator().manual_seed(4)).topk(TOP_K).indices
    return float(torch.stack([max_violation(expert_counts(ids, NUM_EXPERTS)) for ids in draws]).mean())


@pytest.mark.parametrize("rule", ["sign", "rms"])
def test_loss_free_balances_a_skewed_router(rule):
    history = run_skewed_router(LossFree(num_experts=NUM_EXPERTS, top_k=TOP_K, rate=1e-3, rule=rule))
    assert max_violation(history[0]) > 2
    last = history[-WINDOW:]
    assert max_violation(last.sum(0)) < 0.02
    assert float(torch.stack([max_violation(c) for c in last]).mean()) < sampling_floor() + 0.03


def test_quantile_balances_a_skewed_router_at_once():
    history = run_skewed_router(Quantile(num_experts=NUM_EXPERTS, top_k=TOP_K, decay=0.0), steps=10)
    assert max_violation(history[0]) > 2
    assert max_violation(history[1]) < 0.5  # one round of the dual
    # a few rounds: the floor of sampling, 0.12, once for the tokens counted and once for those the thresholds saw
    assert max_violation(history[9]) < 0.3


def test_quantile_with_decay_changes_the_bias_less():
    loud = run_skewed_router(Quantile(num_experts=NUM_EXPERTS, top_k=TOP_K, decay=0.0), steps=100)[50:]
    calm = run_skewed_router(Quantile(num_experts=NUM_EXPERTS, top_k=TOP_K, decay=0.9), steps=100)[50:]
    mean = [float(torch.stack([max_violation(c) for c in history]).mean()) for history in (loud, calm)]
    assert mean[1] < mean[0]


def test_budget_balances_experts_and_keeps_the_average_number_per_token():
    balance = Budget(num_experts=NUM_EXPERTS, top_k=TOP_K, rate=1e-3)
    history = run_skewed_router(balance, threshold=True).float()
    assert history[0].sum() / TOKENS > 1.3 * TOP_K
    last = history[-WINDOW:]
    assert float(last.sum() / TOKENS / WINDOW) == pytest.approx(TOP_K, rel=0.01)
    assert max_violation(last.sum(0)) < 0.03


def test_budget_starts_at_the_budget_where_logits_are_standard_normal():
    balance = Budget(num_experts=32, top_k=4, rate=1e-3)
    chosen = torch.randn(20000, 32).sigmoid() + balance.bias > 0
    # 640 000 draws of probability 1/8: a standard error of 0.013 experts per token
    assert float(chosen.float().sum(-1).mean()) == pytest.approx(4, abs=0.06)


def test_the_first_loss_free_step_is_the_hand_computed_one():
    counts = {"expert_counts": torch.tensor([4, 1, 1, 2])}
    sign = LossFree(num_experts=4, top_k=1, rate=0.1, rule="sign")
    sign.after_optimizer_step(counts)
    torch.testing.assert_close(sign.bias, torch.tensor([-0.125, 0.075, 0.075, -0.025]))
    rms = LossFree(num_experts=4, top_k=1, rate=0.1, rule="rms")
    rms.after_optimizer_step(counts)
    # errors 2, -1, -1, 0 over their root-mean-square sqrt(1.5)
    torch.testing.assert_close(rms.bias, -0.1 * torch.tensor([2.0, -1.0, -1.0, 0.0]) / 1.5**0.5)


@pytest.mark.parametrize("rule", ["sign", "rms"])
def test_even_counts_leave_the_bias_unchanged(rule):
    balance = LossFree(num_experts=4, top_k=1, rate=0.1, rule=rule)
    balance.after_optimizer_step({"expert_counts": torch.full((4,), 7)})
    assert (balance.bias == 0).all()


def test_the_bias_stays_fp32_whatever_the_model_is_cast_to():
    balance = LossFree(num_experts=4, top_k=1, rate=1e-3, rule="sign")
    balance.bias.copy_(torch.tensor([1.001, -1.001, 0.5, -0.5]))
    kept = balance.bias.clone()
    for cast in (balance.bfloat16, balance.half):
        cast()
        assert balance.bias.dtype == torch.float32
        assert torch.equal(balance.bias, kept)
    assert "bias" in balance.state_dict()


def aux_loss(scope, weight=1.0):
    return AuxLoss(num_experts=8, top_k=2, weight=weight, scope=scope)


def loss_of(balance, routing, num_sequences=4):
    return balance.losses(routing, num_sequences=num_sequences)["load_balance_loss"]


def test_the_auxiliary_loss_equals_its_formula():
    routing = route(torch.randn(20, 8), None, top_k=2)
    total = 0.0
    for expert in range(8):
        share = float((routing.expert_ids == expert).sum()) / 40
        total += 8 * share * float(routing.probabilities[:, expert].mean())
    assert float(loss_of(aux_loss("micro_batch", weight=0.5), routing)) == pytest.approx(0.5 * total, rel=1e-6)
    by_sequence = [Routing(*(part[i : i + 5] for part in routing)) for i in range(0, 20, 5)]
    each = [float(loss_of(aux_loss("micro_batch"), r)) for r in by_sequence]
    assert float(loss_of(aux_loss("sequence"), routing)) == pytest.approx(sum(each) / 4, rel=1e-6)


def test_the_auxiliary_loss_is_one_at_perfect_balance():
    ids = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    routing = Routing(ids, torch.ones(4, 2), torch.zeros(4, 8), torch.full((4, 8), 1 / 8))
    for scope in ("sequence", "micro_batch", "global_batch"):
        assert float(loss_of(aux_loss(scope), routing, num_sequences=1)) == pytest.approx(1.0, rel=1e-6)


def test_the_gradient_of_the_auxiliary_loss_is_that_of_the_squared_load_error_straight_through():
    logits = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    routing = route(logits, None, top_k=2)
    (gradient,) = torch.autograd.grad(loss_of(aux_loss("micro_batch"), routing), logits, retain_graph=True)
    counts = expert_counts(routing.expert_ids, 8).double() / 128
    mean_probability = routing.probabilities.mean(0)
    load = counts + mean_probability - mean_probability.detach()
    (expected,) = torch.autograd.grad(8 * 0.5 * (load - 1 / 8).square().sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)  # fp64


def test_the_global_loss_of_micro_batches_averages_to_that_of_the_whole_batch():
    balance = aux_loss("global_batch")
    balance.after_optimizer_step({"expert_counts": torch.tensor([9, 1, 5, 5, 7, 3, 6, 4])})
    whole = route(torch.randn(40, 8), None, top_k=2)
    parts = [Routing(*(part[i : i + 10] for part in whole)) for i in range(0, 40, 10)]
    mean = sum(float(loss_of(balance, part)) for part in parts) / 4
    assert mean == pytest.approx(float(loss_of(balance, whole)), rel=1e-6)
    expected = 8 * (torch.tensor([9, 1, 5, 5, 7, 3, 6, 4]) / 40 * whole.probabilities.mean(0)).sum()
    assert mean == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
def test_gradient_descent_on_the_auxiliary_loss_evens_the_load(scope):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(512, 15), torch.ones(512, 1)], dim=1)
    proj = torch.nn.Parameter(torch.randn(8, 16) / 4)
    proj.data[:, -1] = torch.randn(8)  # some experts are liked by all tokens
    balance = aux_loss(scope)
    violations = []
    for _ in range(300):
        routing = route(x @ proj.t(), None, top_k=2)
        counts = expert_counts(routing.expert_ids, 8)
        violations.append(float(max_violation(counts)))
        (gradient,) = torch.autograd.grad(loss_of(balance, routing), proj)
        proj.data -= 3.0 * gradient
        balance.after_optimizer_step({"expert_counts": counts})
    assert violations[-1] < 0.5 * violations[0]


@pytest.mark.parametrize(
    "build",
    [
        lambda: aux_loss("sequence", weight=0.0),
        lambda: LossFree(num_experts=4, top_k=1, rate=-1.0, rule="sign"),
        lambda: Budget(num_experts=4, top_k=1, rate=float("nan")),
        lambda: Budget(num_experts=4, top_k=4, rate=0.1),
        lambda: Quantile(num_experts=4, top_k=1, decay=1.0),
        lambda: Quantile(num_experts=4, top_k=4, decay=0.0),
    ],
)
def test_settings_out_of_range_are_refused(build):
    with pytest.raises(ConfigError, match=r"model\.ffn\.\S+=\S+: .*; (try|use)|decay=1.0: must lie"):
        build()
