"""Gated delta attention: chunks against the loop over tokens, every gate against its definition, decoding, limits."""

import itertools

import pytest
import torch
from attention_pairs import GEOMETRY, build_pair

from llm.errors import ConfigError
from llm.model.attention import delta_chunks
from llm.model.attention.delta_chunks import chunked_delta, recurrent_delta
from llm.model.attention.linear_chunks import chunked_linear

GATES = [{"gate": gate, "negative": negative} for gate in ("head", "channel", "none") for negative in (False, True)]
FP32 = {"atol": 2e-5, "rtol": 2e-4}
"""Sums of up to 100 terms near 1 in fp32 in another order."""


def inputs_of(time, *, features, documents, dtype=torch.float64, scale=5.0):
    """Unit keys of two documents or more, gates down to −scale, and a state to continue."""
    q, k, v = (torch.randn(2, time, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    write = torch.rand(2, time, 2, dtype=torch.float64)
    log_keep = -scale * torch.rand(2, time, 2, features, dtype=torch.float64)
    ids = torch.zeros(2, time, dtype=torch.long)
    if documents:
        ids[0, time // 4 :] += 1
        ids[0, time // 2 :] += 1
        ids[1, min(16, time - 1) :] += 1
    initial = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    tensors = [x.to(dtype).requires_grad_() for x in (q, k, v, write, log_keep, initial)]
    return tensors, ids


def run_rule(rule, tensors, ids, **options):
    *inputs, initial = tensors
    before = torch.zeros(len(ids), dtype=torch.long)
    return rule(*inputs, document_ids=ids, initial=initial, before=before, **options)


@pytest.mark.parametrize("features", [1, 8])
@pytest.mark.parametrize("chunk_size", [4, 16, 32, 64])
@pytest.mark.parametrize("time", [1, 37, 64])
@pytest.mark.parametrize("documents", [False, True])
def test_chunks_equal_the_loop_over_tokens_with_all_gradients(features, chunk_size, time, documents):
    tensors, ids = inputs_of(time, features=features, documents=documents)
    fast, state = run_rule(chunked_delta, tensors, ids, chunk_size=chunk_size)
    slow, last = run_rule(recurrent_delta, tensors, ids)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close((fast, state), (slow, last), **exact)
    slopes = torch.randn_like(slow), torch.randn_like(last)
    found, wanted = (torch.autograd.grad(pair, tensors, slopes) for pair in ((fast, state), (slow, last)))
    torch.testing.assert_close(found, wanted, **exact)


@pytest.mark.parametrize("features", [1, 8])
@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_fp32_stays_close_to_fp64_for_any_gate(features, scale):
    tensors, ids = inputs_of(256, features=features, documents=False, scale=scale)
    exact, _ = run_rule(chunked_delta, tensors, ids, chunk_size=64)
    single, _ = run_rule(chunked_delta, [x.detach().float() for x in tensors], ids, chunk_size=64)
    assert (single.double() - exact).norm() / exact.norm() < 1e-5


@pytest.mark.parametrize("features", [1, 8])
def test_strong_gates_before_the_end_of_a_document_stay_finite_in_fp32(features):
    tensors, ids = inputs_of(128, features=features, documents=True, scale=5.0)
    for cut in (40, 43, 70, 100):  # documents of every length, also inside a block of rows
        ids[:, cut:] += 1
    slow, _ = run_rule(recurrent_delta, tensors, ids)
    wanted = torch.autograd.grad(slow.square().sum(), tensors)
    single = [x.detach().float().requires_grad_() for x in tensors]
    fast, _ = run_rule(chunked_delta, single, ids, chunk_size=64)
    found = torch.autograd.grad(fast.square().sum(), single)
    assert (fast.double() - slow).norm() / slow.norm() < 1e-5
    for own, exact in zip(found, wanted, strict=True):
        assert (own.double() - exact).norm() <= 1e-4 * exact.norm()


def test_equal_keys_do_not_blow_up_the_solve():
    tensors, ids = inputs_of(64, features=1, documents=False, dtype=torch.float32, scale=0.0)
    q, k, v, write, log_keep, initial = (x.detach() for x in tensors)
    tensors = [q, k[:, :1].expand_as(k), v, torch.full_like(write, 0.98), log_keep, initial]
    (fast, _), (slow, _) = (
        run_rule(chunked_delta, tensors, ids, chunk_size=64),
        run_rule(recurrent_delta, [x.double() for x in tensors], ids),
    )
    assert (fast.double() - slow).norm() / slow.norm() < 1e-5


def test_the_carry_has_the_right_gradient():
    shapes = ((3, 1, 2, 5, 1), (3, 1, 2, 4, 5), (3, 1, 2, 4, 6), (3, 1, 2, 4, 5), (1, 2, 5, 6))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(delta_chunks._CarryDelta.apply, tensors)


def test_a_key_that_is_written_again_returns_its_last_value_and_no_write_keeps_the_state():
    tensors, ids = inputs_of(20, features=1, documents=False)
    q, k, v, write, log_keep, initial = (x.detach() for x in tensors)
    k = k[:, :1].expand_as(k)
    q = k.repeat_interleave(2, dim=2)
    out, _ = run_rule(chunked_delta, [q, k, v, torch.ones_like(write), 0 * log_keep, initial], ids, chunk_size=16)
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=2), rtol=1e-12, atol=1e-12)
    frozen = [q, k, v, 0 * write, 0 * log_keep, initial]
    assert torch.equal(run_rule(chunked_delta, frozen, ids, chunk_size=16)[1], initial)


def test_orthogonal_keys_without_a_gate_give_linear_attention():
    q, v = torch.randn(1, 8, 2, 8, dtype=torch.float64), torch.randn(1, 8, 2, 8, dtype=torch.float64)
    k = torch.linalg.qr(torch.randn(1, 2, 8, 8, dtype=torch.float64))[0].movedim(1, 2)
    ids, initial = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    write = torch.ones(1, 8, 2, dtype=torch.float64)
    mixed, _ = run_rule(chunked_delta, [q, k, v, write, torch.zeros_like(write)[..., None], initial], ids, chunk_size=4)
    keys = {"document_ids": ids, "initial": initial, "before": ids[:, 0]}
    linear, _ = chunked_linear(q, k, v, log_decay=None, chunk_size=4, **keys)
    torch.testing.assert_close(mixed, linear, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", GATES, ids=str)
@pytest.mark.parametrize("position", ["none", "rope"])
def test_every_gate_equals_its_pair_weights_and_its_cached_decoding(settings, position, rows):
    layer = build_pair("delta", position, **settings)
    x, positions, ids = rows(61)
    inputs = [x.requires_grad_(), *layer.parameters()]
    fast = layer(x, positions=positions, document_ids=ids).hidden
    q, k, v = layer.project(x, document_ids=ids)
    slow = layer.reference_attend(q, k, v, positions=positions, document_ids=ids, **layer.gates(x))
    slow = layer.o_proj(slow.flatten(2))
    torch.testing.assert_close(fast, slow, **FP32)
    slope = torch.randn_like(fast)
    found, wanted = (torch.autograd.grad(out, inputs, slope) for out in (fast, slow))
    assert all(grad.abs().sum() > 0 for grad in found)  # taps and gates get a gradient
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    for step in (1, 3, 7):
        cache = layer.new_cache(batch=2, max_length=61, device=x.device, dtype=x.dtype)
        cuts = [0, 20, *range(20 + step, 61, step), 61]
        with torch.no_grad():
            parts = [
                layer(x[:, a:b], positions=positions[:, a:b], document_ids=ids[:, a:b], cache=cache).hidden
                for a, b in itertools.pairwise(cuts)
            ]
        torch.testing.assert_close(torch.cat(parts, 1), fast, **FP32)


@pytest.mark.parametrize("settings", GATES[::2], ids=str)
def test_other_documents_change_no_bit(settings, rows):
    layer = build_pair("delta", "none", **settings).eval()
    x, positions, ids = rows(120)
    x = 3 * x
    whole = layer(x, positions=positions, document_ids=ids).hidden
    for document in ids[0].unique():
        inside = ids[0] == document
        others = x.clone()
        others[0, ~inside] *= 30
        assert torch.equal(layer(others, positions=positions, document_ids=ids).hidden[0, inside], whole[0, inside])


def test_gates_lie_in_their_ranges_and_start_near_keeping_all():
    x = 3 * torch.randn(2, 50, 48)
    for settings in GATES:
        layer = build_pair("delta", "none", **settings)
        gates = layer.gates(x)
        assert gates["write"].min() >= 0
        assert gates["write"].max() <= (2 if settings["negative"] else 1)
        assert gates["log_keep"].max() <= 0
        assert gates["log_keep"].shape[-1] == (16 if settings["gate"] == "channel" else 1)
        assert gates["log_keep"].min() >= (-5 if settings["gate"] == "channel" else -torch.inf)
        start = layer.gates(torch.zeros(1, 1, 48))["log_keep"].exp().flatten(2)[0, 0]
        kept = 1.0 if settings["gate"] == "none" else torch.tensor([1 - 2.0**-5, 1 - 2.0**-8])
        expected = (
            torch.full_like(start, kept) if settings["gate"] == "none" else kept.repeat_interleave(len(start) // 2)
        )
        torch.testing.assert_close(start, expected, rtol=1e-4, atol=0)


def test_flops_and_the_bytes_of_the_state_equal_a_count_by_hand():
    layer = build_pair("delta", "none", chunk_size=64)
    heads, kv, size, width = GEOMETRY.num_heads, GEOMETRY.num_kv_heads, GEOMETRY.head_dim, GEOMETRY.d_model
    channels = (heads + 2 * kv) * size
    weights = width * channels + heads * size * width
    mixing = kv * (4 * 64 * size + 4 * size**2) + heads * (4 * 64 * size + 2 * size**2)
    gates_and_taps = 2 * 2 * kv * width + 2 * 4 * channels
    assert layer.flops_per_token(1024) == 2 * weights + gates_and_taps + mixing
    cache = layer.new_cache(batch=3, max_length=10**6, device=torch.device("cpu"), dtype=torch.float32)
    assert cache.nbytes() == 3 * (kv * size**2 * 4 + 3 * channels * 4 + 3 * 8 + 8)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"qk_norm": True}, r"qk_norm=true: model\.attention=delta gives queries and keys unit length"),
        ({"key_norm": True}, r"key_norm=true: model\.attention=delta gives queries and keys unit length"),
        ({"chunk_size": 0}, r"chunk_size=0: must be at least 1"),
        ({"conv": 1}, r"conv=1: must be 0 for none, or at least 2"),
    ],
)
def test_a_setting_without_meaning_is_refused(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        build_pair("delta", "none", **settings)
