"""Each sight shows the keys that its definition names, and is refused where it has no meaning."""

import itertools
from dataclasses import replace

import pytest
import torch
from attention_pairs import VALID_PAIRS, build_pair

from llm.contracts import Sight
from llm.errors import ConfigError, ShapeError
from llm.model.attention.kernels import reference_attention, sighted_attention
from llm.model.attention.kernels.key_spans import key_spans, within
from llm.model.attention.kernels.reference import visible_keys
from llm.ops.kernel_choice import DEFAULT, using

SIGHTS = [Sight("bidirectional"), Sight("block", 4), Sight("block_pair", 4), Sight("block_pair", 64)]
ROTARY = {"rope", "ntk", "ntk_mixed", "yarn", "llama3", "linear_scaling"}


def rows_of(time, *, documents=True, batch=2, seed=0):
    """Document ids and positions of rows with documents of about 20 tokens."""
    random = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, time, generator=random) < (0.05 if documents else 0)
    starts[:, 0] = True
    places = torch.arange(time).expand(batch, -1)
    first = places.masked_fill(~starts, 0).cummax(1).values
    return starts.long().cumsum(1), places - first


def inputs_of(sight, time, **options):
    """Document ids and positions as a sight reads them."""
    ids, positions = rows_of(time, **options)
    return (ids.repeat(1, 2), positions.repeat(1, 2)) if sight.kind == "block_pair" else (ids, positions)


def sees(sight, i, j, ids, positions):
    """The rule of a pair of places, in words of plain Python."""
    if ids[i] != ids[j]:
        return False
    if sight.kind == "bidirectional":
        return True
    a, b = int(positions[i]) // sight.block_length, int(positions[j]) // sight.block_length
    if sight.kind == "block":
        return b <= a
    half = len(ids) // 2
    is_noisy_query, is_noisy_key = i < half, j < half
    if is_noisy_key:
        return is_noisy_query and a == b
    return b < a if is_noisy_query else b <= a


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_visible_keys_and_spans_equal_the_rule_of_each_pair(sight):
    ids, positions = inputs_of(sight, 30)
    time = ids.shape[1]
    sizes = {"time": time, "time_k": time, "document_ids": ids, "window": None, "positions": positions}
    visible = visible_keys(**sizes, device=ids.device, sight=sight)
    spans = key_spans(sight, **sizes)
    pieces = ((0, time),) * (spans.shape[-1] // 2)
    by_span = torch.stack(within(spans, pieces).split(time, -1)).any(0)
    for row, (i, j) in itertools.product(range(2), itertools.product(range(time), repeat=2)):
        expected = sees(sight, i, j, ids[row], positions[row])
        assert (bool(visible[row, i, j]), bool(by_span[row, i, j])) == (expected, expected), (row, i, j)


@pytest.mark.parametrize("short_row", [512, 0])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("time", [1, 33, 200])
@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_the_kernel_equals_the_definition_with_gradients(sight, time, documents, short_row):
    ids, positions = inputs_of(sight, time, documents=documents)
    q, k, v = (torch.randn(2, ids.shape[1], h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    options = {"sight": sight, "positions": positions, "document_ids": ids if documents else None, "scale": 0.3}
    with using(replace(DEFAULT, short_row=short_row)):
        fast, slow = sighted_attention(q, k, v, **options), reference_attention(q, k, v, **options)
        slope = torch.randn_like(fast)
        found, expected = (torch.autograd.grad(out, (q, k, v), slope) for out in (fast, slow))
    exact = {"rtol": 1e-9, "atol": 1e-12}  # fp64 on both sides: only the order of summation differs
    torch.testing.assert_close(fast, slow, **exact)
    for own, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(own, truth, **exact)


def test_a_two_sided_window_shows_keys_on_both_sides():
    q, k, v = (torch.randn(1, 90, 2, 8, dtype=torch.float64) for _ in range(3))
    options = {"sight": Sight("bidirectional"), "positions": torch.arange(90)[None], "scale": 0.3, "window": 7}
    torch.testing.assert_close(sighted_attention(q, k, v, **options), reference_attention(q, k, v, **options))


def test_queries_after_stored_keys_see_all_of_them_and_blocks_need_all_keys_at_once():
    q, k, v = torch.randn(2, 5, 2, 8), torch.randn(2, 40, 2, 8), torch.randn(2, 40, 2, 8)
    options = {"positions": torch.arange(40).expand(2, -1), "scale": 0.3}
    mixed = sighted_attention(q, k, v, sight=Sight("bidirectional"), **options)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.3)
    torch.testing.assert_close(mixed, expected.transpose(1, 2))
    with pytest.raises(ShapeError, match="reads all 40 keys at once"):
        sighted_attention(q, k, v, sight=Sight("block", 4), **options)


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_the_layer_equals_its_definition_and_a_document_sees_nothing_of_the_others(sight):
    layer = build_pair("softmax", "rope")
    ids, positions = inputs_of(sight, 40)
    x = torch.randn(2, ids.shape[1], 48)
    out = layer(x, positions=positions, document_ids=ids, sight=sight).hidden
    q, k, v = layer.project(x)
    slow = layer.reference_attend(q, k, v, positions=positions, document_ids=ids, sight=sight)
    torch.testing.assert_close(out, layer.o_proj(slow.flatten(2)), atol=2e-5, rtol=2e-4)
    inside = ids[0] == ids[0, 0]
    others = x.clone()
    others[0, ~inside] = 100 * torch.randn_like(others[0, ~inside])
    changed = layer(others, positions=positions, document_ids=ids, sight=sight).hidden
    assert torch.equal(changed[0, inside], out[0, inside])


@pytest.mark.parametrize(("attention", "position"), VALID_PAIRS, ids=map("-".join, VALID_PAIRS))
def test_each_pair_serves_the_sights_that_have_a_meaning_and_refuses_others_with_the_reason(attention, position):
    layer = build_pair(attention, position)
    layer.check_sight(Sight("causal"))
    for sight in SIGHTS:
        if attention == "softmax" and position in ROTARY:
            layer.check_sight(sight)
        else:
            with pytest.raises(
                ConfigError,
                match=rf"model.(attention|position)=.*{'' if attention == 'softmax' else attention}.*; use model/",
            ):
                layer.check_sight(sight)


def test_a_window_and_a_scale_by_position_are_refused_where_they_have_no_meaning():
    windowed = build_pair("softmax", "rope", window=8)
    windowed.check_sight(Sight("bidirectional"))
    with pytest.raises(ConfigError, match=r"model\.attention\.window=8: a window cuts through blocks"):
        windowed.check_sight(Sight("block", 4))
    scaled = build_pair("softmax", "rope")
    scaled.position.log_n.mode = "full"
    with pytest.raises(ConfigError, match="log_n=full scales a query by the number of keys before it"):
        scaled.check_sight(Sight("bidirectional"))


def test_flops_count_the_keys_of_each_sight():
    layer, time = build_pair("softmax", "rope"), 32
    ids, positions = torch.zeros(1, time, dtype=torch.long), torch.arange(time)[None]
    for sight in [Sight("causal"), *SIGHTS]:
        if sight.block_length > time:
            continue
        twice = 2 if sight.kind == "block_pair" else 1
        keys = {"document_ids": ids.repeat(1, twice), "positions": positions.repeat(1, twice)}
        sizes = {"time": twice * time, "time_k": twice * time, "window": None, "device": ids.device}
        pairs = visible_keys(**sizes, **keys, sight=sight).sum().item()
        assert layer.mixing_flops_per_token(time, sight) == 4 * 4 * 16 * pairs / time
        weights = sum(p.numel() for name, p in layer.named_parameters() if "proj" in name)
        assert layer.flops_per_token(time, sight) == 2 * twice * weights + layer.mixing_flops_per_token(time, sight)
