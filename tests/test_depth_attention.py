"""Sublayers that read from depth: equal to the plain sum at the start, and to the stacked softmax afterwards."""

import pytest
import torch

from llm.config.build import build_meta_model, build_model
from llm.errors import ConfigError
from llm.model.depth_attention import Depth, DepthQuery, as_source, num_sources

SMALL = (
    "model.d_model=32", "model.num_layers=3", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn.d_ff=48",
    "tokenizer=bytes", "context_length=24", "batch_tokens=24", "micro_batch_size=1",
)  # fmt: skip


@pytest.fixture
def decoder(composed):
    def build(*overrides, drawn=True):
        model = build_model(composed(*SMALL, *overrides), 97)
        for name, parameter in model.named_parameters() if drawn else ():
            if name.endswith("query"):
                torch.nn.init.normal_(parameter)
        return model

    return build


def hidden(model, ids, **options):
    return model(ids, positions=torch.arange(ids.shape[1]).expand(len(ids), -1), **options).hidden


def sources(count):
    return [(scale + 1.0) * torch.randn(2, 5, 16, dtype=torch.float64) for scale in range(count)]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_new_model_computes_what_the_plain_sum_does(decoder, size, norm):
    ids = torch.randint(97, (2, 24))
    plain = decoder(f"model/norm={norm}")
    deep = decoder(f"model/norm={norm}", "model.residual=attention", f"model.residual_block={size}", drawn=False)
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in deep.named_parameters() if not name.endswith("query")] == names
    torch.testing.assert_close(hidden(deep, ids), hidden(plain, ids), atol=1e-5, rtol=1e-5)


def test_reading_equals_the_stacked_softmax_with_gradients():
    values = [value.requires_grad_() for value in sources(4)]
    query = DepthQuery(d_model=16, eps=1e-6, num_sources=4).double()
    torch.nn.init.normal_(query.query)
    depth = Depth(tuple(as_source(value, 1e-6) for value in values[:3]), values[3])
    stacked = torch.stack(values)
    logits = (stacked / (stacked.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ query.query
    expected = 4 * (logits.softmax(0)[..., None] * stacked).sum(0)
    found = query(depth)
    torch.testing.assert_close(found.hidden, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    slope, inputs = torch.randn_like(expected), [query.query, *values]
    for own, wanted in zip(
        torch.autograd.grad(found.hidden, inputs, slope), torch.autograd.grad(expected, inputs, slope), strict=True
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_sources_are_the_embedding_whole_blocks_and_the_current_block(decoder, size):
    model = decoder("model.residual=attention", f"model.residual_block={size}")
    seen = []
    queries = [m for m in model.modules() if isinstance(m, DepthQuery)]
    hooks = [query.register_forward_hook(lambda _m, _i, out: seen.append(out.weights.shape[-1])) for query in queries]
    hidden(model, torch.randint(97, (1, 5)))
    assert seen == [1 + place // size + bool(place % size) for place in range(7)]
    assert sorted(query.num_sources for query in queries) == sorted(seen)
    assert num_sources(6, 6) == 2
    for hook in hooks:
        hook.remove()


def test_recomputed_blocks_and_cached_decoding_equal_the_whole_pass(decoder):
    ids = torch.randint(97, (2, 24))
    model = decoder("model.residual=attention").train()
    whole = hidden(model, ids)
    gradients = torch.autograd.grad(whole.square().sum(), list(model.layers.parameters()))
    model.recompute_every = 1
    again = hidden(model, ids)
    assert torch.equal(again, whole)
    for own, wanted in zip(
        torch.autograd.grad(again.square().sum(), list(model.layers.parameters())), gradients, strict=True
    ):
        assert torch.equal(own, wanted)
    caches = model.new_caches(batch=2, max_length=24, dtype=torch.float32)
    positions = torch.arange(24).expand(2, -1)
    with torch.no_grad():
        parts = [model(ids[:, t : t + 1], positions=positions[:, t : t + 1], caches=caches).hidden for t in range(24)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=2e-4)


def test_flops_count_each_source_and_bf16_stays_close(decoder):
    plain, deep = decoder(), decoder("model.residual=attention", "model.residual_block=2")
    places = [1, 2, 2, 3, 3, 4, 4]
    added = sum(4 * (count + 1) * 32 for count in places)
    assert deep.flops_per_token(24) - plain.flops_per_token(24) == added
    ids = torch.randint(97, (2, 24))
    exact = hidden(deep, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = hidden(deep, ids)
    assert (half.float() - exact).square().mean() < 0.02 * exact.square().mean()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("model.residual_block=2",), r"residual_block=2: only model\.residual=attention has blocks"),
        (("model.residual=attention", "model.residual_block=7"), r"residual_block=7: must lie in \[1, 6\]"),
    ],
)
def test_a_block_without_meaning_is_refused(composed, overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        build_meta_model(composed(*SMALL, *overrides))
