"""Linear attention: every setting, and its three forms compared with each other."""

import itertools

import pytest
import torch
from attention_pairs import GEOMETRY, build_pair

from llm.errors import ConfigError
from llm.model.attention.linear import decay_logits
from llm.model.attention.linear_chunks import chunked_linear

SETTINGS = [
    {"feature_map": feature_map, "decay": decay, "output_norm": output_norm}
    for feature_map, decay, output_norm in itertools.product(
        ["elu", "softmax", "relu", "identity"], ["none", "fixed", "learned", "token"], [False, True]
    )
    if output_norm or feature_map in ("elu", "softmax")
]
FP32 = {"atol": 2e-5, "rtol": 2e-4}
"""Sums of 100 terms near 1 in fp32 in another order, and a division by one of them."""


def loop(q, k, v, ids, log_decay):
    """o_i = q_iᵀ S_i, S_i = γ S_{i−1} + k_i v_iᵀ token by token, S = 0 where a document starts."""
    group = q.shape[2] // k.shape[2]
    state = torch.zeros(len(q), k.shape[2], k.shape[-1], v.shape[-1], dtype=q.dtype)
    out = []
    for i in range(q.shape[1]):
        same = (ids[:, i] == ids[:, max(i - 1, 0)])[:, None, None, None]
        now = log_decay if log_decay.ndim == 1 else log_decay[:, i]
        state = torch.where(same, state, 0.0) * now.exp()[..., None, None]
        state = state + k[:, i, :, :, None] * v[:, i, :, None, :]
        out.append(torch.einsum("bhe,bhed->bhd", q[:, i], state.repeat_interleave(group, 1)))
    return torch.stack(out, 1), state


@pytest.mark.parametrize("time", [1, 63, 100])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 200])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_chunks_of_any_size_equal_the_loop_over_time_with_gradients(time, chunk_size, packed, per_token, rows):
    q, k, v = (torch.randn(2, time, h, d, dtype=torch.float64, requires_grad=True) for h, d in ((4, 5), (2, 5), (2, 3)))
    ids = rows(time)[2] if packed else torch.zeros(2, time, dtype=torch.long)
    log_decay = torch.tensor([-0.3, -0.01], dtype=torch.float64, requires_grad=True)
    if per_token:
        log_decay = -torch.rand(2, time, 2, dtype=torch.float64).mul(3).requires_grad_()
    initial, before = torch.zeros(2, 2, 5, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    fast, state = chunked_linear(
        q, k, v, document_ids=ids, log_decay=log_decay, chunk_size=chunk_size, initial=initial, before=before
    )
    slow, last = loop(q, k, v, ids, log_decay)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(state, last)
    grad, state_grad = torch.randn_like(slow), torch.randn_like(last)
    inputs = (q, k, v, log_decay)
    fast_grads = torch.autograd.grad((fast * grad).sum() + (state * state_grad).sum(), inputs, allow_unused=True)
    slow_grads = torch.autograd.grad((slow * grad).sum() + (last * state_grad).sum(), inputs, allow_unused=True)
    for fast_grad, slow_grad in zip(fast_grads, slow_grads, strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(zero if fast_grad is None else fast_grad, zero if slow_grad is None else slow_grad)


def test_strong_gates_before_the_end_of_a_document_stay_finite_in_fp32():
    q, k, v = (torch.randn(1, 64, 2, 8) for _ in range(3))
    log_decay = torch.full((1, 64, 2), -9.0, requires_grad=True)
    ids = (torch.arange(64) >= 50).long()[None]
    keys = {"document_ids": ids, "initial": torch.zeros(1, 2, 8, 8), "before": ids[:, 0]}
    out, state = chunked_linear(q, k.requires_grad_(), v, log_decay=log_decay, chunk_size=64, **keys)
    slow, last = loop(q, k, v, ids, log_decay)
    torch.testing.assert_close((out, state), (slow, last), **FP32)
    gradients = torch.autograd.grad((out.sum() + state.sum()), (k, log_decay))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_gradient_reaches_the_state_that_a_text_continues():
    q, k, v = (torch.randn(1, 20, 2, 4, dtype=torch.float64) for _ in range(3))
    initial = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(1, 20, dtype=torch.long)

    def run(state):
        return chunked_linear(q, k, v, document_ids=ids, log_decay=None, chunk_size=8, initial=state, before=ids[:, 0])

    assert torch.autograd.gradcheck(run, initial)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_setting_equals_its_definition_and_decodes(settings, rows, monkeypatch):
    layer = build_pair("linear", "rope", **settings)
    x, positions, ids = rows(100)
    fast = layer(x, positions=positions, document_ids=ids).hidden
    with torch.no_grad():
        cache = layer.new_cache(batch=2, max_length=100, device=x.device, dtype=x.dtype)
        cuts = [0, 30, *range(90, 101)]
        parts = [
            layer(x[:, a:b], positions=positions[:, a:b], document_ids=ids[:, a:b], cache=cache).hidden
            for a, b in itertools.pairwise(cuts)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), fast, **FP32)
    monkeypatch.setattr(
        layer,
        "attend",
        lambda q, k, v, *, positions, document_ids, cache, sight, **gates: (
            layer.reference_attend(q, k, v, positions=positions, document_ids=document_ids, **gates),
            {},
            {},
        ),
    )
    torch.testing.assert_close(layer(x, positions=positions, document_ids=ids).hidden, fast, **FP32)


def test_the_cache_is_as_large_at_any_length():
    layer = build_pair("linear", "rope")
    cache = layer.new_cache(batch=1, max_length=10, device=torch.device("cpu"), dtype=torch.float32)
    before = cache.nbytes()
    x, positions = torch.randn(1, 300, GEOMETRY.d_model), torch.arange(300)[None]
    layer(x, positions=positions, document_ids=None, cache=cache)
    assert cache.nbytes() == before
    assert cache.length == 300


def test_decays_are_those_of_retnet():
    # arXiv:2307.08621, eq. 8: γ = 1 − 2^(−5 − arange(0, heads)), here spread from 5 to 8
    torch.testing.assert_close(decay_logits(4).sigmoid(), 1 - 2.0 ** -torch.arange(5.0, 9.0))


@pytest.mark.parametrize("feature_map", ["relu", "identity"])
def test_weights_that_may_sum_to_zero_are_refused(feature_map):
    with pytest.raises(ConfigError, match=f"feature_map={feature_map}"):
        build_pair("linear", "rope", feature_map=feature_map)
