"""Transformer-VQ: block sizes, estimators, packed documents, and what the cache holds."""

import pytest
import torch
from attention_pairs import build_pair

from llm.contracts import PositionView
from llm.errors import ConfigError
from llm.model.attention.codebook import Codebook
from llm.model.attention.vq_blocks import attend_blocks

FP32 = {"atol": 2e-5, "rtol": 2e-4}
"""Sums of up to 1000 terms near 1 in fp32, in another order."""


def ready(**settings):
    layer = build_pair("vq", "rerope", **settings)
    layer.train()(torch.randn(2, 100, 48), positions=torch.arange(100).expand(2, -1), document_ids=None)
    return layer.eval()


@pytest.mark.parametrize("block_size", [10, 16, 33, 64, 500])
def test_the_result_does_not_depend_on_the_block_size(block_size, rows):
    layer = ready(block_size=20)
    x, positions, ids = rows(400)
    expected = layer(x, positions=positions, document_ids=ids).hidden
    layer.block_size = block_size
    torch.testing.assert_close(layer(x, positions=positions, document_ids=ids).hidden, expected, **FP32)


def test_blocks_equal_quadratic_attention_over_quantised_keys_to_rounding():
    """In fp64, so that nothing but the method could differ."""
    time, size = 300, 24
    codes = torch.randn(2, size, 8, dtype=torch.float64)
    code_ids = torch.randint(size, (1, time, 2))
    keys = codes[torch.arange(2), code_ids]
    q = torch.randn(1, time, 4, 8, dtype=torch.float64)
    v = torch.randn(1, time, 2, 5, dtype=torch.float64)
    ids = torch.zeros(1, time, dtype=torch.long)
    view = PositionView(q=q, k=keys, min_distance=0)
    fast = attend_blocks((view,), v, code_ids=code_ids, codes=codes, document_ids=ids, block_size=32, scale=0.3)
    scores = torch.einsum("bihd,bjhd->bhij", q, keys.repeat_interleave(2, 2)) * 0.3
    later = torch.ones(time, time, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    exact = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(fast, exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_lose_nothing_in_half_precision(dtype):
    """All far keys share one code and all scores are 0: every token has the same weight, to the last of thousands."""
    time = 4000
    codes = torch.zeros(1, 2, 8, dtype=dtype)
    view = PositionView(
        q=torch.randn(1, time, 1, 8, dtype=dtype), k=torch.zeros(1, time, 1, 8, dtype=dtype), min_distance=0
    )
    v = torch.zeros(1, time, 1, 1, dtype=dtype)
    v[:, : time // 2] = 1
    mixed = attend_blocks(
        (view,), v, code_ids=torch.zeros(1, time, 1, dtype=torch.long), codes=codes,
        document_ids=torch.zeros(1, time, dtype=torch.long), block_size=50, scale=8**-0.5,
    )  # fmt: skip
    # a mean of 1 over the first half of all tokens; bf16 results are rounded at 2e-3, a bare bf16 logarithm errs by 2 %
    assert abs(float(mixed[0, -1]) - 0.5) < 4e-3


@pytest.mark.parametrize("estimator", ["straight_through", "rotation", "simvq", "ema", "diveq"])
def test_every_estimator_equals_its_definition_with_gradients(estimator, rows, monkeypatch):
    without_commitment = {"codebook.commitment_weight": 0.0} if estimator == "diveq" else {}
    layer = ready(**{"codebook.estimator": estimator}, **without_commitment)
    x, positions, ids = rows(150)
    x.requires_grad_()
    inputs, weights = [x, *layer.parameters()], torch.randn(2, 150, 48)

    def grads():
        hidden = layer(x, positions=positions, document_ids=ids).hidden
        return torch.autograd.grad((hidden * weights).sum(), inputs, allow_unused=True)

    fast = grads()
    monkeypatch.setattr(
        layer,
        "attend",
        lambda q, k, v, *, positions, document_ids, cache, sight: (
            layer.reference_attend(q, k, v, positions=positions, document_ids=document_ids),
            {},
            {},
        ),
    )
    for a, b in zip(fast, grads(), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)  # sums over 300 tokens and the projections


def test_the_cache_stops_growing(rows):
    layer = ready()
    cache = layer.new_cache(batch=2, max_length=10, device=torch.device("cpu"), dtype=torch.float32)
    sizes = []
    x, positions, ids = rows(600, documents=False)
    with torch.no_grad():
        for start in range(0, 600, 20):
            part = slice(start, start + 20)
            layer(x[:, part], positions=positions[:, part], document_ids=ids[:, part], cache=cache)
            sizes.append(cache.nbytes())
    assert len(set(sizes[3:])) == 1


def test_training_returns_losses_metrics_and_statistics(rows):
    layer = ready().train()
    x, positions, ids = rows(100)
    out = layer(x, positions=positions, document_ids=ids)
    assert set(out.losses) == {"commitment_loss"}
    assert {"codebook_usage", "codebook_perplexity", "quantization_error", "stat/code_counts"} <= set(out.metrics)
    assert out.metrics["stat/code_counts"].sum() == 2 * 100 * 2  # rows, tokens, key/value heads
    assert all(not value.requires_grad for value in out.metrics.values())


def test_soft_gradients_are_those_of_counting_by_shares_and_change_no_value():
    """In fp64, against sums over all far keys made anew for every block."""
    time, size, block = 130, 12, 20
    codes = torch.randn(1, size, 8)
    codebook = Codebook(
        num_heads=1, head_dim=8, codebook_size=size, estimator="ema", commitment_weight=0.0, ema_decay=0.9,
        revive_every=None, seed=0,
    ).eval()  # fmt: skip
    codebook.base.copy_(codes)
    keys = torch.randn(1, time, 1, 8, requires_grad=True)
    q = torch.randn(1, time, 2, 8, dtype=torch.float64)
    v = torch.randn(1, time, 1, 5, dtype=torch.float64, requires_grad=True)
    shares = codebook.soft_assignment(keys, 0.2).double()
    ids = shares.argmax(-1)
    assert torch.equal(ids, codebook.nearest(keys))
    quantized = codes[0].double()[ids]
    view = PositionView(q=q, k=quantized, min_distance=0)
    options = {"code_ids": ids, "codes": codes.double(), "document_ids": torch.zeros(1, time, dtype=torch.long)}
    options |= {"block_size": block, "scale": 0.35}
    soft = attend_blocks((view,), v, **options, assignment=shares)
    torch.testing.assert_close(soft, attend_blocks((view,), v, **options))
    expected = []
    for i in range(time):
        first = max(i // block - 1, 0) * block
        near = torch.einsum("hd,jd->hj", q[0, i], quantized[0, first : i + 1, 0]) * 0.35
        counts = shares[0, :first, 0].sum(0)
        used = counts > 0.5
        means = (shares[0, :first, 0].T @ v[0, :first, 0]) / counts.clamp_min(1)[:, None]
        far = torch.einsum("hd,sd->hs", q[0, i], codes[0].double()) * 0.35 + counts.clamp_min(1).log()
        scores = torch.cat((far.masked_fill(~used, -torch.inf), near), dim=1)
        expected.append(scores.softmax(-1) @ torch.cat((means, v[0, first : i + 1, 0])))
    expected = torch.stack(expected)[None]
    torch.testing.assert_close(soft, expected)
    grad = torch.randn_like(soft)
    fast = torch.autograd.grad((soft * grad).sum(), (keys, v), retain_graph=True)
    slow = torch.autograd.grad((expected * grad).sum(), (keys, v))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)  # keys and their softmax are fp32
    assert (fast[0][:, : time // block * block - 2 * block].abs().sum(-1) > 0).all()


def test_a_temperature_that_is_not_positive_is_refused():
    with pytest.raises(ConfigError, match="soft_gradient=0"):
        build_pair("vq", "none", soft_gradient=0.0)
