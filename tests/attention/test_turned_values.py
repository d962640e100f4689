"""Positions that turn a share of each head or turn values, and keys that are values: held against their definitions."""

import itertools

import pytest
import torch
from attention_pairs import GEOMETRY, build_small
from catalogue import CONF, options
from omegaconf import OmegaConf

from llm.contracts import Sight
from llm.errors import ConfigError

KEYS = {name: set(OmegaConf.load(CONF / "model/position" / f"{name}.yaml")) for name in options("model/position")}
SHARING = [name for name, keys in KEYS.items() if "rotary_share" in keys]
TURNING = [name for name, keys in KEYS.items() if "turn_values" in keys]
CASES = [
    *(("softmax", name, {"rotary_share": 0.5}, {}) for name in SHARING),
    *(("linear", name, {"rotary_share": 0.25}, {}) for name in ("rope", "ntk")),
    *(("softmax", name, {"turn_values": True}, {}) for name in TURNING),
    *(("softmax", name, {"turn_values": True, "rotary_share": 0.5}, {"shared_kv": True}) for name in TURNING),
    *(("softmax", name, {}, {"shared_kv": True}) for name in ("rope", "none", "rerope")),
    ("softmax", "rope", {"turn_values": True}, {"shared_kv": True, "window": 9, "qk_norm": True}),
]
each_case = pytest.mark.parametrize(("attention", "position", "turning", "settings"), CASES)
EXACT = {"atol": 1e-5, "rtol": 1e-4}
"""fp32 angles of up to 150 radians, and sums of 150 terms in another order."""


def build(attention, position, turning, settings):
    built = build_small(f"position/{position}", turning, head_dim=GEOMETRY.head_dim)
    return build_small(f"attention/{attention}", settings, position=built, layer_index=0, geometry=GEOMETRY)


def run(layer, x, positions, ids, cache=None):
    return layer(x, positions=positions, document_ids=ids, cache=cache).hidden


@each_case
def test_the_fast_form_equals_the_definition_with_gradients(attention, position, turning, settings, rows):
    layer = build(attention, position, turning, settings)
    x, positions, ids = rows(150)
    inputs = [x.requires_grad_(), *layer.parameters()]
    fast = run(layer, x, positions, ids)
    q, k, v = layer.project(x)
    slow = layer.o_proj(layer.reference_attend(q, k, v, positions=positions, document_ids=ids).flatten(2))
    torch.testing.assert_close(fast, slow, **EXACT)
    slope = torch.randn_like(fast)
    pairs = zip(torch.autograd.grad(fast, inputs, slope), torch.autograd.grad(slow, inputs, slope), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@each_case
@torch.no_grad()
def test_decoding_equals_the_full_pass_and_a_shift_of_all_positions_changes_nothing(
    attention, position, turning, settings, rows
):
    layer = build(attention, position, turning, settings)
    x, positions, ids = rows(60)
    whole = run(layer, x, positions, ids)
    cache = layer.new_cache(batch=2, max_length=60, device=x.device, dtype=x.dtype)
    cuts = [0, 30, 37, *range(40, 61)]
    parts = [run(layer, x[:, a:b], positions[:, a:b], ids[:, a:b], cache) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
    if layer.position.scales_queries:
        return
    # angles of 1000 radians are rounded at 6e-5, times outputs near 1
    torch.testing.assert_close(run(layer, x, positions + 1000, ids), whole, atol=1e-3, rtol=0)


def test_values_are_turned_by_their_own_positions_pair_by_pair():
    layer = build("softmax", "rope", {"turn_values": True}, {})
    x, positions = torch.randn(1, 20, 48), torch.arange(20)[None]
    q, k, v = layer.project(x)
    weights = layer.pair_weights(q, k, positions=positions, document_ids=None)
    half, frequencies = 8, layer.position.frequencies
    values = torch.complex(v[..., :half], v[..., half:]).repeat_interleave(2, dim=2).to(torch.complex128)
    turn = torch.exp(1j * (positions[0] - positions[0][:, None])[..., None] * frequencies)  # R_{j−i}
    mixed = torch.einsum("bhij,ijm,bjhm->bihm", weights.to(torch.complex128), turn, values)
    expected = torch.cat((mixed.real, mixed.imag), -1).flatten(2).float()
    torch.testing.assert_close(run(layer, x, positions, None), layer.o_proj(expected), **EXACT)


@pytest.mark.parametrize("sight", [Sight("bidirectional"), Sight("block", 4), Sight("block_pair", 4)], ids=str)
def test_other_sights_turn_values_too(sight):
    layer = build("softmax", "rope", {"turn_values": True}, {"shared_kv": True})
    places = torch.arange(20).repeat(2, 2) if sight.kind == "block_pair" else torch.arange(40).expand(2, -1)
    x = torch.randn(2, 40, 48)
    keys = {"positions": places, "document_ids": torch.zeros(2, 40, dtype=torch.long), "sight": sight}
    slow = layer.reference_attend(*layer.project(x), **keys)
    torch.testing.assert_close(layer(x, **keys).hidden, layer.o_proj(slow.flatten(2)), **EXACT)


@pytest.mark.parametrize("position", SHARING)
def test_a_share_of_one_changes_no_bit_and_a_smaller_one_keeps_the_last_elements(position):
    q, k, positions = torch.randn(1, 9, 4, 16), torch.randn(1, 9, 2, 16), torch.arange(9)[None]
    default, half = (
        build_small(f"position/{position}", {"rotary_share": share, "log_n": "none", "train_length": None}, head_dim=16)
        for share in (1.0, 0.5)
    )
    small = build_small(f"position/{position}", {"log_n": "none", "train_length": None}, head_dim=8)
    narrow = small(q[..., :8], k[..., :8], positions)
    for one, other in zip(half(q, k, positions), narrow, strict=True):
        assert torch.equal(one.q[..., :8], other.q)
        assert torch.equal(one.k[..., :8], other.k)
        assert torch.equal(one.q[..., 8:], q[..., 8:])
        assert torch.equal(one.k[..., 8:], k[..., 8:])
    assert len(default.frequencies) == 8
    assert len(half.frequencies) == 4


def test_shared_keys_have_no_value_projection_and_half_the_cache():
    sizes = {}
    for name, turning, settings in (
        ("apart", {}, {}),
        ("turned", {"turn_values": True}, {"shared_kv": True}),
        ("unturned", {}, {"shared_kv": True}),
    ):
        layer = build("softmax", "rope", turning, settings)
        cache = layer.new_cache(batch=1, max_length=8, device=torch.device("cpu"), dtype=torch.float32)
        run(layer, torch.randn(1, 5, 48), torch.arange(5)[None], None, cache)
        sizes[name] = (sum(p.numel() for p in layer.parameters()), cache.nbytes() - 8 * 8, layer.flops_per_token(64))
    weights = 48 * 2 * 16
    assert sizes["apart"][0] - sizes["turned"][0] == weights
    assert sizes["apart"][2] - sizes["turned"][2] == 2 * weights
    assert sizes["apart"][1] == 2 * sizes["turned"][1] == 2 * 8 * 2 * 16 * 4
    assert sizes["unturned"][1] == sizes["apart"][1]  # keys are scored turned and read unturned


@pytest.mark.parametrize(
    ("attention", "turning", "reason"),
    [
        ("softmax", {"rotary_share": 0.0}, r"rotary_share=0\.0: must be above 0"),
        ("softmax", {"rotary_share": 1.5}, r"rotary_share=1\.5: must be above 0 and at most 1"),
        ("softmax", {"rotary_share": 0.1}, r"rotary_share=0\.1: turns no pair of a head of 16; set at least 0\.125"),
        ("linear", {"turn_values": True}, r"turn_values=true: model\.attention=linear sums values in a state"),
        ("performer", {"turn_values": True}, r"turn_values=true: model\.attention=performer sums values in a state"),
    ],
)
def test_a_setting_without_meaning_is_refused_with_the_reason(attention, turning, reason):
    with pytest.raises(ConfigError, match=reason):
        build(attention, "rope", turning, {})
