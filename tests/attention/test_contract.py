"""The contract of attention, checked for every valid pair of an attention and a position."""

import itertools

import pytest
import torch
from attention_pairs import ALL_PAIRS, INVALID_PAIRS, VALID_PAIRS, build_pair, reason_against
from torch import nn

ATTENTIONS = sorted({attention for attention, _ in ALL_PAIRS})
every_pair = pytest.mark.parametrize(("attention", "position"), VALID_PAIRS, ids=map("-".join, VALID_PAIRS))

FP32 = {"atol": 2e-5, "rtol": 2e-4}
"""Sums of up to 1000 terms near 1 in fp32, in another order; linear kinds divide by sums of them."""
FP32_GRADIENTS = {"atol": 1e-4, "rtol": 1e-3}
"""The same through one more product and the projections."""


def ready(attention, position, **settings):
    """Build a pair in evaluation mode; what is learned from data (codes) has seen some."""
    layer = build_pair(attention, position, **settings)
    layer.train()(torch.randn(2, 40, 48), positions=torch.arange(40).expand(2, -1), document_ids=None)
    return layer.eval()


def slow(layer):
    """The same layer with its definition in the place of its fast form."""

    def attend(q, k, v, *, positions, document_ids, cache, sight, **gates):
        keys = {"positions": positions, "document_ids": document_ids, "sight": sight}
        return layer.reference_attend(q, k, v, **keys, **gates), {}, {}

    return attend


def run(layer, x, positions, ids, cache=None):
    return layer(x, positions=positions, document_ids=ids, cache=cache).hidden


def test_conf_offers_what_the_design_lists():
    assert {a for a, _ in ALL_PAIRS} >= {"softmax"}
    assert len(VALID_PAIRS) + len(INVALID_PAIRS) == len(ALL_PAIRS)


@every_pair
@pytest.mark.parametrize("time", [1, 63, 150])
@pytest.mark.parametrize("documents", [False, True])
def test_forward_and_gradients_equal_the_definition(attention, position, time, documents, rows, monkeypatch):
    layer = ready(attention, position)
    x, positions, ids = rows(time, documents=documents)
    x.requires_grad_()
    ids = ids if documents else None
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    weights = torch.randn(2, time, 48)
    fast = run(layer, x, positions, ids)
    fast_grads = torch.autograd.grad((fast * weights).sum(), inputs, allow_unused=True)
    monkeypatch.setattr(layer, "attend", slow(layer))
    expected = run(layer, x, positions, ids)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs, allow_unused=True)
    torch.testing.assert_close(fast, expected, **FP32)
    for fast_grad, expected_grad in zip(fast_grads, expected_grads, strict=True):
        missing = torch.zeros(())
        torch.testing.assert_close(
            missing if fast_grad is None else fast_grad,
            missing if expected_grad is None else expected_grad,
            **FP32_GRADIENTS,
        )


@every_pair
def test_the_jacobian_is_lower_triangular_without_zeros(attention, position):
    time = 50
    layer = ready(attention, position)
    positions = torch.arange(time)[None]
    jacobian = torch.autograd.functional.jacobian(
        lambda x: run(layer, x, positions, None).sum(-1)[0], torch.randn(1, time, 48), vectorize=False
    )
    strength = jacobian[:, 0].abs().sum(-1)
    assert not strength.triu(1).any()
    assert (strength.tril() + torch.ones_like(strength).triu(1) > 0).all()


@every_pair
def test_later_tokens_change_no_earlier_output(attention, position, rows):
    layer = ready(attention, position)
    x, positions, ids = rows(100)
    changed = x.clone()
    changed[:, 41:] = 10 * torch.randn_like(x[:, 41:])
    before, after = run(layer, x, positions, ids), run(layer, changed, positions, ids)
    assert torch.equal(before[:, :41], after[:, :41])
    assert not torch.equal(before[:, 41:], after[:, 41:])


@every_pair
def test_a_document_sees_nothing_of_the_others(attention, position, rows):
    layer = ready(attention, position)
    x, positions, ids = rows(120)
    together = run(layer, x, positions, ids)
    for row in range(2):
        for document in ids[row].unique():
            inside = ids[row] == document
            alone = run(layer, x[row : row + 1, inside], positions[row : row + 1, inside], None)
            torch.testing.assert_close(together[row : row + 1, inside], alone, **FP32)
            others = x.clone()
            others[row, ~inside] = 100 * torch.randn_like(others[row, ~inside])
            assert torch.equal(run(layer, others, positions, ids)[row, inside], together[row, inside])


@every_pair
@pytest.mark.parametrize("time", [1, 63, 256, 1000])
@torch.no_grad()
def test_decoding_with_the_cache_equals_the_full_forward(attention, position, time, rows):
    layer = ready(attention, position)
    x, positions, ids = rows(time)
    cache = layer.new_cache(batch=2, max_length=time, device=x.device, dtype=x.dtype)
    # a prompt, a chunk, and single tokens
    cuts = sorted({0, min(time, int(time * 0.8)), min(time, int(time * 0.8) + 37), *range(max(0, time - 40), time + 1)})
    parts = [run(layer, x[:, a:b], positions[:, a:b], ids[:, a:b], cache) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, 1), run(layer, x, positions, ids), **FP32)
    assert cache.length == time
    assert cache.nbytes() > 0


@every_pair
@torch.no_grad()
def test_a_cache_decodes_token_by_token_from_nothing(attention, position, rows):
    layer = ready(attention, position)
    x, positions, ids = rows(70)
    cache = layer.new_cache(batch=2, max_length=70, device=x.device, dtype=x.dtype)
    parts = [run(layer, x[:, t : t + 1], positions[:, t : t + 1], ids[:, t : t + 1], cache) for t in range(70)]
    torch.testing.assert_close(torch.cat(parts, 1), run(layer, x, positions, ids), **FP32)


@every_pair
@torch.no_grad()
def test_a_reordered_cache_continues_the_chosen_rows(attention, position, rows):
    layer = ready(attention, position)
    x, positions, ids = rows(60, batch=3)
    cache = layer.new_cache(batch=3, max_length=60, device=x.device, dtype=x.dtype)
    run(layer, x[:, :50], positions[:, :50], ids[:, :50], cache)
    kept = torch.tensor([2, 0])
    cache.reorder(kept)
    tail = run(layer, x[kept, 50:], positions[kept, 50:], ids[kept, 50:], cache)
    torch.testing.assert_close(tail, run(layer, x, positions, ids)[kept, 50:], **FP32)


@every_pair
def test_bf16_autocast_trains_close_to_fp32(attention, position, rows):
    layer = ready(attention, position)
    x, positions, ids = rows(100)
    exact = run(layer, x, positions, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(layer, x, positions, ids)
    half.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    # 8 bits through four products; a code may change where two are nearly as close, so the bound is on the mean
    assert (half.float() - exact).square().mean() < 0.02 * exact.square().mean()


@pytest.mark.parametrize(("attention", "position"), INVALID_PAIRS, ids=map("-".join, VALID_PAIRS))
def test_an_invalid_pair_is_refused_with_the_reason(attention, position):
    reason = reason_against(attention, position)
    assert reason.startswith("model.position")
    assert f"model.attention={attention}" in reason.replace("model/attention", "model.attention")
    assert ";" in reason


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_flops_count_projections_and_mixing(attention):
    position = next(p for a, p in VALID_PAIRS if a == attention)
    layer = build_pair(attention, position)
    weights = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
    assert layer.flops_per_token(128) > 2 * weights
    assert layer.flops_per_token(1024) >= layer.flops_per_token(128)
