"""Two views merged by log-sum-exp, held against one softmax over scores picked pair by pair."""

import pytest
import torch

from llm.contracts import PositionView
from llm.model.attention.kernels import causal_attention
from llm.model.attention.kernels.reference import visible_keys
from llm.model.attention.views import attend_views, reference_views

SCALE = 0.25


def make(time, *, queries=None, split=11, dtype=torch.float64, heads=4, kv_heads=2):
    queries = time if queries is None else queries
    views = tuple(
        PositionView(
            q=torch.randn(2, queries, heads, 16, dtype=dtype, requires_grad=True),
            k=torch.randn(2, time, kv_heads, 16, dtype=dtype, requires_grad=True),
            min_distance=distance,
        )
        for distance in (0, split)
    )
    return views, torch.randn(2, time, kv_heads, 8, dtype=dtype, requires_grad=True)


def documents(time):
    ids = torch.zeros(2, time, dtype=torch.long)
    ids[0, time // 3 :] += 1
    ids[0, time // 3 + 2 :] += 1
    ids[1, 2 * time // 3 :] += 1
    return ids


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 13, 30])
@pytest.mark.parametrize(("time", "queries"), [(1, 1), (17, 17), (63, 63), (200, 200), (200, 40), (63, 60), (300, 20)])
def test_merged_views_equal_the_definition_with_gradients(time, queries, window, packed):
    views, v = make(time, queries=queries)
    options = {"document_ids": documents(time) if packed else None, "scale": SCALE, "window": window}
    inputs = [*(x for view in views for x in (view.q, view.k)), v]
    fast, slow = attend_views(views, v, **options), reference_views(views, v, **options)
    # lse is fp32, its rounding of 1e-7 of values below 10 shifts weight between the two parts
    torch.testing.assert_close(fast, slow, atol=5e-6, rtol=1e-5)
    weights = torch.randn_like(slow)
    fast_grads = torch.autograd.grad((fast * weights).sum(), inputs, allow_unused=True)
    slow_grads = torch.autograd.grad((slow * weights).sum(), inputs, allow_unused=True)
    for fast_grad, slow_grad in zip(fast_grads, slow_grads, strict=True):
        fast_grad = torch.zeros_like(slow_grad) if fast_grad is None else fast_grad
        torch.testing.assert_close(fast_grad, slow_grad, atol=2e-5, rtol=1e-5)


def test_another_document_leaves_no_trace_in_the_merged_result():
    views, v = make(120, dtype=torch.float32)
    ids = torch.zeros(2, 120, dtype=torch.long)
    ids[:, 50:] = 1
    before = attend_views(views, v, document_ids=ids, scale=SCALE)
    with torch.no_grad():
        for x in (*(view.k for view in views), v):
            x[:, :50] = 1e4 * torch.randn_like(x[:, :50])
    assert torch.equal(attend_views(views, v, document_ids=ids, scale=SCALE)[:, 50:], before[:, 50:])


@pytest.mark.parametrize("split", [1, 11, 62])
def test_two_views_compute_exactly_the_pairs_of_plain_causal_attention(split, monkeypatch):
    pairs = []

    def counted(q, k, v, *, document_ids, scale, window, return_lse):
        visible = visible_keys(
            time=q.shape[1], time_k=k.shape[1], device=q.device, document_ids=document_ids, window=window
        )
        pairs.append(int(visible.sum()))
        return causal_attention(q, k, v, document_ids=document_ids, scale=scale, window=window, return_lse=return_lse)

    monkeypatch.setattr("llm.model.attention.views.causal_attention", counted)
    views, v = make(200, split=split)
    attend_views(views, v, document_ids=None, scale=SCALE)
    assert sum(pairs) == 200 * 201 // 2


def test_half_precision_is_merged_as_exactly_as_one_softmax():
    views, v = make(200, dtype=torch.bfloat16)
    exact = tuple(view._replace(q=view.q.double(), k=view.k.double()) for view in views)
    truth = reference_views(exact, v.double(), document_ids=None, scale=SCALE)
    fast = attend_views(views, v, document_ids=None, scale=SCALE).double()
    slow = reference_views(views, v, document_ids=None, scale=SCALE).double()
    # bf16 keeps 8 bits: both err by about 4e-3 of values near 1
    assert (fast - truth).abs().max() < 2 * (slow - truth).abs().max() + 4e-3
