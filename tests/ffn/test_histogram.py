import pytest
import torch

from llm.errors import ConfigError
from llm.model.ffn.balance.budget import Budget
from llm.model.ffn.balance.histogram import TOKENS_PER_SLAB, count_by_bin, upper_quantile
from llm.model.ffn.balance.quantile import Quantile
from llm.model.ffn.expert_counts import expert_counts, max_violation
from llm.model.ffn.routing import Routing

RANGE = {"low": -1.0, "high": 1.0}


def routing_of(logits, bias, top_k):
    scores = logits.sigmoid()
    margins, ids = (scores + bias).topk(top_k)
    return Routing(ids, torch.ones_like(margins), logits, scores / scores.sum(-1, keepdim=True))


def test_counts_of_parts_add_up_to_those_of_the_whole():
    values = torch.randn(TOKENS_PER_SLAB + 700, 5)
    whole = count_by_bin(values, **RANGE, bins=64)
    parts = sum(count_by_bin(part, **RANGE, bins=64) for part in values.split(999))
    assert torch.equal(whole, parts)
    assert torch.equal(whole.sum(1), torch.full((5,), len(values)))


def test_counts_equal_those_of_a_loop_and_end_bins_count_values_outside():
    values = torch.tensor([[-2.0], [-1.0], [-0.4], [0.0], [0.49], [0.5], [1.0], [3.0]])
    assert count_by_bin(values, **RANGE, bins=4).tolist() == [[2, 1, 2, 3]]


@pytest.mark.parametrize("share", [1 / 64, 0.125, 0.5, 0.9])
def test_the_quantile_is_the_exact_one_to_a_bin(share):
    values = torch.randn(5000, 8).mul_(0.3).clamp_(-1, 1)
    found = upper_quantile(count_by_bin(values, **RANGE, bins=500), share, **RANGE)
    exact = values.double().sort(dim=0, descending=True).values[round(share * 5000)]
    assert (found - exact).abs().max() <= 2 / 500


def test_values_spread_evenly_give_the_quantile_without_the_error_of_a_bin():
    values = torch.linspace(-1, 1, 100001)[:, None]
    found = upper_quantile(count_by_bin(values, **RANGE, bins=10), 0.37, **RANGE)
    assert float(found) == pytest.approx(1 - 2 * 0.37, abs=1e-4)  # a bin is 0.2 wide


def mixed_text(*, mix, parts=8, tokens=2048, experts=64):
    """Router logits of micro-batches that each prefer other experts by offsets from N(0, mix²)."""
    generator = torch.Generator().manual_seed(5)
    offsets = mix * torch.randn(parts, 1, experts, generator=generator)
    return torch.randn(parts, tokens, experts, generator=generator) + offsets


def violation_after(logits, update, *, top_k=8, updates=6):
    """Update a bias on the same micro-batches a few times; return the maximal violation over all of them."""
    bias = torch.zeros(logits.shape[-1])
    for _ in range(updates):
        bias = update(bias, logits)
    ids = (logits.flatten(0, 1).sigmoid() + bias).topk(top_k).indices
    return float(max_violation(expert_counts(ids, logits.shape[-1])))


def mean_of_local_quantiles(bias, parts, top_k=8):
    local = []
    for logits in parts:
        scores = logits.sigmoid()
        alpha = (scores + bias).topk(top_k + 1).values[:, -1:]
        local.append((scores - alpha).quantile(1 - top_k / scores.shape[1], dim=0))
    beta = torch.stack(local).mean(0)
    return -(beta - beta.mean())


def summed_counts(bias, parts, top_k=8):
    rule = Quantile(num_experts=parts.shape[-1], top_k=top_k, decay=0.0, bins=1000)
    rule.bias.copy_(bias)
    seen = [rule.statistics(routing_of(logits, rule.bias, top_k))["quantile_counts"] for logits in parts]
    rule.after_optimizer_step({"quantile_counts": sum(seen)})
    return rule.bias


def test_micro_batches_of_different_text_balance_over_the_whole_update():
    logits = mixed_text(mix=1.0)
    assert violation_after(logits, summed_counts) < 0.1
    assert violation_after(logits, mean_of_local_quantiles) > 0.5


def test_the_bias_does_not_depend_on_how_an_update_is_divided():
    logits = mixed_text(mix=0.5, parts=4, tokens=256, experts=16)
    whole = summed_counts(torch.zeros(16), logits.flatten(0, 1)[None], top_k=2)
    assert torch.equal(summed_counts(torch.zeros(16), logits, top_k=2), whole)


def test_a_budget_by_quantile_gives_the_average_number_of_experts_at_once():
    balance = Budget(num_experts=32, top_k=4, rate=1e-3, rule="quantile")
    logits = torch.randn(8192, 32) + torch.randn(32)
    balance.after_optimizer_step(balance.statistics(routing_of(logits, balance.bias, 4)))
    chosen = logits.sigmoid() + balance.bias > 0
    assert float(chosen.float().sum(-1).mean()) == pytest.approx(4, abs=0.02)
    assert float(max_violation(chosen.sum(0))) < 0.02


def test_too_few_bins_are_refused():
    with pytest.raises(ConfigError, match=r"model\.ffn\.balance\.bins=4: must be at least 16"):
        Quantile(num_experts=4, top_k=1, decay=0.0, bins=4)
