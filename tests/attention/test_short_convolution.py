"""The short convolution and the gates of recurrent attentions: definitions, documents, decoding, starts, gradients."""

import itertools

import pytest
import torch
from attention_pairs import GEOMETRY, build_pair

from llm.errors import ConfigError
from llm.model.attention.concentration import concentration_by_layer
from llm.model.attention.short_convolution import ShortConvolution, Tail, TokenGate, keep_start

GATED = {"conv": 4, "decay": "token", "output_norm": True, "chunk_size": 16}
CASES = [
    GATED,
    {"conv": 3},
    {"decay": "token"},
    {"conv": 2, "decay": "token", "feature_map": "identity", "output_norm": True},
]
FP32 = {"atol": 2e-5, "rtol": 2e-4}


def run(layer, x, positions, ids, cache=None):
    return layer(x, positions=positions, document_ids=ids, cache=cache).hidden


def empty(batch, taps, channels):
    options = {"device": torch.device("cpu"), "dtype": torch.float64}
    return Tail.empty(batch=batch, before=taps - 1, channels=channels, **options)


@pytest.mark.parametrize("taps", [2, 4])
def test_the_convolution_equals_its_definition_and_token_by_token_from_its_tail(taps, rows):
    conv = ShortConvolution(channels=6, taps=taps).double()
    x, _, ids = rows(30, d_model=6)
    x = x.double()
    whole, _ = conv(x, ids, empty(2, taps, 6))
    weight = conv.taps.view(6, taps)
    for row, i in itertools.product(range(2), range(30)):
        total = torch.zeros(6, dtype=torch.float64)
        for back in range(min(taps, i + 1)):
            if ids[row, i - back] == ids[row, i]:
                total = total + weight[:, back] * x[row, i - back]
        torch.testing.assert_close(whole[row, i], total * total.sigmoid(), rtol=1e-12, atol=1e-14)
    tail, parts = empty(2, taps, 6), []
    for a, b in itertools.pairwise([0, 1, 2, 9, *range(10, 31)]):
        part, tail = conv(x[:, a:b], ids[:, a:b], tail)
        parts.append(part)
    torch.testing.assert_close(
        torch.cat(parts, 1), whole, rtol=1e-14, atol=1e-15
    )  # silu of short rows rounds otherwise


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("position", ["none", "rope"])
def test_a_layer_equals_its_definition_and_its_cached_decoding(settings, position, rows):
    layer = build_pair("linear", position, **settings)
    x, positions, ids = rows(61)
    inputs = [x.requires_grad_(), *layer.parameters()]
    fast = run(layer, x, positions, ids)
    q, k, v = layer.project(x, document_ids=ids)
    slow = layer.reference_attend(q, k, v, positions=positions, document_ids=ids, **layer.gates(x))
    slow = layer.o_proj(slow.flatten(2))
    torch.testing.assert_close(fast, slow, **FP32)
    slope = torch.randn_like(fast)
    for own, wanted in zip(
        torch.autograd.grad(fast, inputs, slope), torch.autograd.grad(slow, inputs, slope), strict=True
    ):
        assert own.abs().sum() > 0  # taps and gates get a gradient
        torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        cache = layer.new_cache(batch=2, max_length=61, device=x.device, dtype=x.dtype)
        cuts = [0, 20, 23, *range(24, 50)]
        parts = [run(layer, x[:, a:b], positions[:, a:b], ids[:, a:b], cache) for a, b in itertools.pairwise(cuts)]
        cache.reorder(torch.tensor([1]))
        parts = torch.cat(parts, 1)[1:]
        tail = run(layer, x[1:, 49:], positions[1:, 49:], ids[1:, 49:], cache)
    torch.testing.assert_close(torch.cat((parts, tail), 1), fast[1:], **FP32)
    others = x.detach().clone()
    others[0, ids[0] != ids[0, 0]] *= 100
    inside = ids[0] == ids[0, 0]
    assert torch.equal(run(layer, others, positions, ids)[0, inside], fast[0, inside])


def test_gates_start_at_the_decays_of_heads_and_taps_at_the_token_itself():
    kept = torch.exp(-torch.nn.functional.softplus(keep_start(4)))
    torch.testing.assert_close(kept, 1 - 2.0 ** -torch.tensor([5.0, 6.0, 7.0, 8.0]), rtol=1e-5, atol=0)
    layer = build_pair("linear", "none", **GATED)
    taps = layer.conv.taps.view(-1, 4)
    assert (taps[:, 0] == 1).all()
    assert 0 < taps[:, 1:].std() < 0.05
    kinds = {m.parameter_kinds["weight" if isinstance(m, TokenGate) else "taps"] for m in (layer.keep_gate, layer.conv)}
    assert kinds == {"vector"}


def test_bytes_and_flops_count_taps_and_gates_by_hand():
    plain, gated = build_pair("linear", "none", output_norm=True), build_pair("linear", "none", **GATED)
    heads, kv, size = GEOMETRY.num_heads, GEOMETRY.num_kv_heads, GEOMETRY.head_dim
    channels = (heads + 2 * kv) * size
    added = 2 * 4 * channels + 2 * kv * GEOMETRY.d_model
    chunk = build_pair("linear", "none", output_norm=True, chunk_size=16)
    assert gated.flops_per_token(128) - chunk.flops_per_token(128) == added
    caches = [
        layer.new_cache(batch=3, max_length=9, device=torch.device("cpu"), dtype=torch.float32).nbytes()
        for layer in (plain, gated)
    ]
    assert caches[1] - caches[0] == 3 * 3 * channels * 4 + 3 * 3 * 8


def test_concentration_reads_gates(composed):
    from llm.config.build import build_model

    model = build_model(
        composed("tokenizer=bytes", "model/attention=linear", "model.attention.conv=4", "model.attention.decay=token"),
        97,
    )
    ids = torch.randint(97, (2, 40))
    inputs = {"positions": torch.arange(40).expand(2, -1), "document_ids": torch.zeros(2, 40, dtype=torch.long)}
    found = concentration_by_layer(model, ids, **inputs)
    with torch.no_grad():
        model.layers[0].attention.keep_gate.bias.fill_(9.0)
    sharper = concentration_by_layer(model, ids, **inputs)
    assert sharper[0]["effective_keys"] < found[0]["effective_keys"]


@pytest.mark.parametrize("conv", [-1, 1])
def test_taps_that_read_no_other_token_are_refused(conv):
    with pytest.raises(ConfigError, match=rf"model\.attention\.conv={conv}: must be 0 for none, or at least 2"):
        build_pair("linear", "none", conv=conv)
