"""Performer: the estimate tends to softmax attention, and stays finite for vectors of any size."""

import itertools
import math

import pytest
import torch
from attention_pairs import build_pair, build_small
from torch.utils._python_dispatch import TorchDispatchMode

from llm.contracts import AttentionGeometry
from llm.model.attention.kernels import reference_attention
from llm.model.attention.performer import orthogonal_directions
from llm.model.attention.performer_chunks import EMPTY, chunked_performer
from llm.model.init import fan_in_normal


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def vectors(scale=1.0, time=64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, time, 2, 16, generator=generator, dtype=torch.float64) * s for s in (scale, scale, 1.0)]


def relative_error(num_features, *, draws=8):
    """Error against softmax attention over several draws, for vectors of ‖q‖² ≈ 1 after their scaling."""
    q, k, v = vectors(0.5)
    positions, squares = torch.arange(64)[None], []
    for seed in range(draws):
        layer = build_pair("performer", "rope", num_features=num_features, feature_seed=seed)
        layer.num_heads, layer.num_kv_heads = 2, 2
        mixed, _, _ = layer.attend(q, k, v, positions=positions, document_ids=None, cache=fp64_cache(layer))
        (view,) = layer.position(q, k, positions)
        exact = reference_attention(view.q, view.k, v, scale=layer.scale)
        squares.append(float((mixed - exact).square().sum() / exact.square().sum()))
    return math.sqrt(sum(squares) / draws)


def fp64_cache(layer):
    return layer.new_cache(batch=1, max_length=0, device=torch.device("cpu"), dtype=torch.float64)


def test_the_error_against_softmax_attention_falls_with_the_root_of_the_features():
    errors = [relative_error(count) for count in (64, 256, 1024, 4096)]
    rates = [math.log(a / b) / math.log(4) for a, b in itertools.pairwise(errors)]
    # −1/2 exactly in the limit; eight draws of 64 rows scatter each rate by about 0.1
    assert all(0.3 < rate < 0.7 for rate in rates), (errors, rates)
    assert errors[-1] < 0.05


def untrained_error(head_dim, **settings):
    """Relative error against softmax attention of an untrained layer of 4 heads on tokens of unit RMS."""
    geometry = AttentionGeometry(d_model=4 * head_dim, num_heads=4, num_kv_heads=4, head_dim=head_dim)
    position = build_small("position/rope", {}, head_dim=head_dim)
    torch.manual_seed(0)
    layer = build_small("attention/performer", settings, geometry=geometry, position=position, layer_index=0)
    fan_in_normal(layer, num_layers=1, embedding_std=0.02, head_std=0.02)
    positions = torch.arange(128)[None]
    with torch.no_grad():
        q, k, v = layer.project(torch.randn(1, 128, 4 * head_dim))
        mixed, _, _ = layer.attend(q, k, v, positions=positions, document_ids=None, cache=None)
        (view,) = layer.position(q, k, positions)
        exact = reference_attention(view.q, view.k, v, scale=layer.scale)
    return float((mixed - exact).norm() / exact.norm()), (view.q, view.k, layer.scale)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_an_untrained_layer_with_qk_norm_is_close_to_softmax_attention(head_dim):
    error, (q, k, scale) = untrained_error(head_dim, num_features=256, chunk_size=64)
    for x in (q, k):
        torch.testing.assert_close(scale * x.square().sum(-1), torch.ones(x.shape[:-1]), atol=1e-4, rtol=0)
    assert error < 0.2
    assert untrained_error(head_dim, qk_norm=False, num_features=256, chunk_size=64)[0] > 0.9


def test_pair_weights_hold_a_bounded_number_of_sums(monkeypatch):
    layer = build_pair("performer", "rope")
    q, k = torch.randn(2, 50, 4, 16), torch.randn(2, 50, 2, 16)
    sizes = {"positions": torch.arange(50).expand(2, -1), "document_ids": None}
    whole = layer.pair_weights(q, k, **sizes)
    one_query = 2 * 50 * 4 * layer.num_features
    monkeypatch.setattr("llm.model.attention.performer.PAIR_ELEMENTS", 3 * one_query)
    with LargestTensor() as largest:
        chunked = layer.pair_weights(q, k, **sizes)
    assert torch.equal(chunked, whole)
    assert largest.numel == 3 * one_query


def test_directions_are_orthogonal_in_groups_and_as_long_as_normal_vectors():
    directions = orthogonal_directions(count=4000, dim=16, generator=torch.Generator().manual_seed(0))
    group = directions[:16] / directions[:16].norm(dim=1, keepdim=True)
    torch.testing.assert_close(group @ group.T, torch.eye(16), atol=1e-5, rtol=0)
    squares = directions.square().sum(1)
    # a chi-square of 16 degrees has mean 16 and variance 32; over 4000 draws the mean scatters by 0.09
    assert abs(squares.mean() - 16) < 0.5
    assert abs(squares.var() - 32) < 5
    assert directions.mean(0).abs().max() < 0.1


def test_layers_draw_directions_of_their_own_from_the_seed():
    def directions(**settings):
        return build_pair("performer", "rope", **settings).directions

    assert torch.equal(directions(), directions())
    assert not torch.equal(directions(), directions(feature_seed=1))
    assert "directions" in build_pair("performer", "rope").state_dict()


@pytest.mark.parametrize("size", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_no_size_of_features_overflows_and_chunks_do_not_matter(size, chunk_size):
    log_q, log_k = (size * torch.randn(1, 64, 2, 32) for _ in range(2))
    v, ids = torch.randn(1, 64, 2, 4), torch.zeros(1, 64, dtype=torch.long)
    start = {"sums": torch.zeros(1, 2, 32, 5), "maxima": torch.full((1, 2, 32), EMPTY)}
    mixed, _ = chunked_performer(
        log_q, log_k, v, document_ids=ids, chunk_size=chunk_size, initial=start, before=ids[:, 0]
    )
    scores = torch.logsumexp(log_q.double()[:, :, None] + log_k.double()[:, None], -1)
    later = torch.ones(64, 64, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later[None, :, :, None], -torch.inf).softmax(2)
    exact = torch.einsum("bijh,bjhd->bihd", weights, v.double())
    # logarithms of size L are rounded at 6e-8 L, which is the relative error of a weight
    torch.testing.assert_close(mixed.double(), exact, atol=2e-5 * max(size / 10, 1), rtol=0)


def test_features_of_any_size_give_a_mean_of_values():
    log_q, log_k = (1e5 * torch.randn(1, 64, 2, 32) for _ in range(2))
    v, ids = torch.rand(1, 64, 2, 4), torch.zeros(1, 64, dtype=torch.long)
    start = {"sums": torch.zeros(1, 2, 32, 5), "maxima": torch.full((1, 2, 32), EMPTY)}
    mixed, _ = chunked_performer(log_q, log_k, v, document_ids=ids, chunk_size=16, initial=start, before=ids[:, 0])
    assert ((mixed >= 0) & (mixed <= 1)).all()


def test_one_enormous_later_key_changes_nothing_before_it():
    log_q, log_k = (torch.randn(1, 64, 2, 32) for _ in range(2))
    v, ids = torch.randn(1, 64, 2, 4), torch.zeros(1, 64, dtype=torch.long)
    start = {"sums": torch.zeros(1, 2, 32, 5), "maxima": torch.full((1, 2, 32), EMPTY)}

    def run(keys):
        return chunked_performer(log_q, keys, v, document_ids=ids, chunk_size=16, initial=start, before=ids[:, 0])[0]

    changed = log_k.clone()
    changed[:, 41] += 1e4
    assert torch.equal(run(changed)[:, :41], run(log_k)[:, :41])
    torch.testing.assert_close(run(changed)[:, 41:], v[:, 41:42].expand(-1, 23, -1, -1))  # it takes all the weight


def test_the_cache_is_as_large_at_any_length():
    layer = build_pair("performer", "rope")
    cache = layer.new_cache(batch=1, max_length=10, device=torch.device("cpu"), dtype=torch.float32)
    before = cache.nbytes()
    layer(torch.randn(1, 300, 48), positions=torch.arange(300)[None], document_ids=None, cache=cache)
    assert cache.nbytes() == before
