"""The contract of positions, checked for every option of conf/model/position."""

import math

import pytest
import torch
from catalogue import build_piece, options

from llm.errors import ConfigError
from llm.model.position.linear_scaling import LinearScalingRoPE
from llm.model.position.llama3 import Llama3RoPE
from llm.model.position.ntk import NTKMixedRoPE, NTKRoPE
from llm.model.position.rerope import LeakyReRoPE, ReRoPE
from llm.model.position.rope import RoPE
from llm.model.position.rotary import AngleMemo, inverse_frequencies
from llm.model.position.yarn import YaRNRoPE

HEAD_DIM = 16
OFF = {"log_n": "none", "train_length": None}
ROPE = {"head_dim": HEAD_DIM, "base": 100.0, **OFF}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 256}
YARN = {
    "beta_fast": 32.0, "beta_slow": 1.0, "original_context_length": 256, "attention_factor": None, "truncate": True,
}  # fmt: skip
FP32_ROTATION = {"atol": 1e-5, "rtol": 0}
"""Rotations run in fp32: two of them, of vectors of length 4, each rounded at 6e-8."""


def build(name):
    position = build_piece("model/position", name, head_dim=HEAD_DIM)
    position.log_n = type(position.log_n)(mode="none", train_length=None)  # held against its own tests below
    return position


def vectors(time, heads=2):
    return torch.randn(1, time, heads, HEAD_DIM, dtype=torch.float64)


def scores(position, q, k, offset=0):
    time = q.shape[1]
    views = position(q, k, torch.arange(time).expand(q.shape[0], -1) + offset)
    distance = torch.arange(time)[:, None] - torch.arange(time)[None, :]
    answer = torch.zeros(q.shape[0], q.shape[2], time, time, dtype=q.dtype)
    for view in views:
        dots = torch.einsum("bihd,bjhd->bhij", view.q, view.k)
        answer = torch.where(distance >= view.min_distance, dots, answer)
    return answer.tril()


def defined_scores(q, k, map_distance, base=100.0):
    """q_i · R_{−ρ(i−j)} k_j pair by pair, in fp64 complex numbers."""
    half = HEAD_DIM // 2
    frequencies = inverse_frequencies(head_dim=HEAD_DIM, base=base)
    q, k = (torch.complex(x[..., :half], x[..., half:]) for x in (q, k))
    time = q.shape[1]
    distance = (torch.arange(time)[:, None] - torch.arange(time)[None, :]).double()
    turn = torch.exp(1j * map_distance(distance)[..., None] * frequencies)
    return torch.einsum("bihm,ijm,bjhm->bhij", q, turn, k.conj()).real.tril()


@pytest.mark.parametrize("name", [n for n in options("model/position") if n != "none"])
def test_frequencies_follow_the_weights_to_a_device_and_are_never_rounded(name):
    position = build(name)
    exact = position.frequencies
    assert exact.dtype == torch.float64
    assert torch.equal(position.to(torch.bfloat16).frequencies, exact)
    moved = position.to("meta").frequencies  # the one other device that every machine has
    assert (moved.device.type, moved.dtype) == ("meta", torch.float64)


@pytest.mark.parametrize("name", options("model/position"))
@pytest.mark.parametrize("time", [1, 63])
def test_views_keep_shape_and_dtype(name, time):
    q, k = torch.randn(2, time, 4, HEAD_DIM), torch.randn(2, time, 2, HEAD_DIM)
    position = build_piece("model/position", name, head_dim=HEAD_DIM)
    for dtype in (torch.float32, torch.bfloat16):
        for view in position(q.to(dtype), k.to(dtype), torch.arange(time).expand(2, -1)):
            assert view.q.shape == q.shape
            assert view.k.shape == k.shape
            assert view.q.dtype == view.k.dtype == dtype


@pytest.mark.parametrize("name", options("model/position"))
def test_scores_depend_on_distance_only(name):
    position = build(name)
    q, k = vectors(133), vectors(133)
    near, far = scores(position, q, k, 0), scores(position, q, k, 1000)
    # angles are fp32: 1000 rad (16000 where far distances are sped up 16 times) carries up to 1e-3 rad of rounding,
    # times |q||k| of about 16
    torch.testing.assert_close(near, far, atol=2e-2 if name == "inv_leaky" else 5e-3, rtol=0)


@pytest.mark.parametrize("name", options("model/position"))
def test_a_position_tells_from_which_distance_keys_are_bare(name):
    position = build(name)
    q, k, positions = vectors(5), vectors(5), torch.arange(5)[None]
    bare = [view.min_distance for view in position(q, k, positions) if torch.equal(view.k, k)]
    assert position.bare_keys_from == (bare[0] if bare else None)
    assert position.far_from == ([view.min_distance for view in position(q, k, positions)][1:] or [None])[0]


def test_rope_equals_its_definition_pair_by_pair():
    q, k = vectors(40), vectors(40)
    torch.testing.assert_close(scores(RoPE(**ROPE), q, k), defined_scores(q, k, lambda r: r), **FP32_ROTATION)


def test_rerope_equals_its_definition_pair_by_pair():
    q, k = vectors(40), vectors(40)
    answer = scores(ReRoPE(**ROPE, window=7), q, k)
    torch.testing.assert_close(answer, defined_scores(q, k, lambda r: r.clamp(max=7)), **FP32_ROTATION)


@pytest.mark.parametrize("slowdown", [0.25, 1.0, 16.0])
def test_leaky_rerope_equals_its_definition_pair_by_pair(slowdown):
    q, k = vectors(40), vectors(40)
    answer = scores(LeakyReRoPE(**ROPE, window=7, slowdown=slowdown), q, k)
    expected = defined_scores(q, k, lambda r: torch.where(r < 7, r, 7 + (r - 7) / slowdown))
    # at slowdown 1/4 angles reach 160 rad in fp32: 1e-5 rad, times |q||k| of about 16
    torch.testing.assert_close(answer, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "neutral",
    [
        NTKRoPE(**ROPE, factor=1.0),
        NTKMixedRoPE(**ROPE, factor=1.0, exponent=0.625),
        LinearScalingRoPE(**ROPE, factor=1.0),
        Llama3RoPE(**ROPE, **LLAMA3, factor=1.0),
        YaRNRoPE(**ROPE, **YARN, factor=1.0),
        ReRoPE(**ROPE, window=63),
        LeakyReRoPE(**ROPE, window=63, slowdown=16.0),
    ],
)
def test_a_neutral_setting_equals_rope_exactly(neutral):
    q, k = vectors(63), vectors(63)
    assert torch.equal(scores(neutral, q, k), scores(RoPE(**ROPE), q, k))


def test_leaky_rerope_without_slowdown_equals_rope():
    q, k = vectors(63), vectors(63)
    leaky = LeakyReRoPE(**ROPE, window=7, slowdown=1.0)
    torch.testing.assert_close(scores(leaky, q, k), scores(RoPE(**ROPE), q, k), **FP32_ROTATION)


def test_leaky_rerope_tends_to_rerope_as_the_slowdown_grows():
    q, k = vectors(63), vectors(63)
    limit = scores(ReRoPE(**ROPE, window=7), q, k)
    gaps = [
        (scores(LeakyReRoPE(**ROPE, window=7, slowdown=slowdown), q, k) - limit).abs().max().item()
        for slowdown in (10.0, 1000.0, 100000.0)
    ]
    assert gaps[1] < 0.05 * gaps[0]
    assert gaps[2] < 0.05 * gaps[1]


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    ("kind", "position", "theirs"),
    [
        ("linear", LinearScalingRoPE, {}),
        ("llama3", Llama3RoPE, {"low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("yarn", YaRNRoPE, {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "truncate": True}),
        ("yarn", YaRNRoPE, {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5, "truncate": False}),
    ],
    ids=["linear", "llama3", "yarn", "yarn, its own bounds and factor"],
)
def test_scaled_positions_equal_those_of_transformers(head_dim, kind, position, theirs):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shared = {"factor": 8.0, "original_max_position_embeddings": 1024}
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=8192,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **shared, **theirs},
    )  # fmt: skip
    expected, amplitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    length = {} if kind == "linear" else {"original_context_length": 1024}
    ours = position(head_dim=head_dim, base=10000.0, factor=8.0, **theirs, **length, **OFF)
    assert (ours.frequencies < RoPE(head_dim=head_dim, base=10000.0, **OFF).frequencies).any()
    torch.testing.assert_close(ours.frequencies.float(), expected, rtol=1e-6, atol=0)
    assert ours.amplitude == pytest.approx(amplitude, rel=1e-12)


def test_the_factor_of_yarn_multiplies_queries_and_keys():
    q, k = vectors(40), vectors(40)
    one, two = (YaRNRoPE(**ROPE, **YARN | {"attention_factor": value}, factor=8.0) for value in (1.0, 2.0))
    torch.testing.assert_close(scores(two, q, k), 4 * scores(one, q, k), **FP32_ROTATION)


@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest_by_its_factor(factor):
    plain, scaled = RoPE(**ROPE).frequencies, NTKRoPE(**ROPE, factor=factor).frequencies
    assert scaled[0] == plain[0]
    torch.testing.assert_close(scaled[-1], plain[-1] / factor)
    # the same as raising the base
    base = 100.0 * factor ** (HEAD_DIM / (HEAD_DIM - 2))
    torch.testing.assert_close(scaled, inverse_frequencies(head_dim=HEAD_DIM, base=base))


def test_ntk_mixed_with_exponent_0_interpolates_positions_and_with_1_raises_the_base_and_divides():
    plain = RoPE(**ROPE).frequencies
    torch.testing.assert_close(NTKMixedRoPE(**ROPE, factor=8.0, exponent=0.0).frequencies, plain / 8)
    fixed = NTKMixedRoPE(**ROPE, factor=8.0, exponent=1.0).frequencies
    raised = inverse_frequencies(head_dim=HEAD_DIM, base=100.0 * 8) / 8 ** (2 / HEAD_DIM)
    torch.testing.assert_close(fixed, raised)


def test_ntk_mixed_is_a_mixed_radix_whose_stretches_multiply_to_the_factor():
    plain = RoPE(**ROPE).frequencies
    ratio = plain / NTKMixedRoPE(**ROPE, factor=8.0, exponent=0.625).frequencies
    stretches = ratio / torch.cat((torch.ones(1), ratio[:-1]))
    torch.testing.assert_close(stretches.prod(), torch.tensor(8.0, dtype=torch.float64))
    assert (stretches.diff() < 0).all()
    assert (stretches > 1).all()


@pytest.mark.parametrize("name", options("model/position"))
def test_the_log_n_scale_multiplies_queries_of_every_position(name):
    plain, q, k = build(name), vectors(50), vectors(50)
    scaled, clipped = build(name), build(name)
    scaled.log_n = type(plain.log_n)(mode="full", train_length=20)
    clipped.log_n = type(plain.log_n)(mode="clipped", train_length=20)
    factor = torch.tensor([math.log(i + 1) / math.log(20) for i in range(50)], dtype=torch.float64)
    expected = scores(plain, q, k) * factor[:, None]
    torch.testing.assert_close(scores(scaled, q, k), expected, atol=2e-5, rtol=1e-5)  # the factor is fp32
    assert torch.equal(scores(clipped, q, k)[:, :, :20], scores(plain, q, k)[:, :, :20])
    torch.testing.assert_close(scores(clipped, q, k)[:, :, 20:], expected[:, :, 20:], atol=2e-5, rtol=1e-5)


def test_the_log_n_scale_follows_positions_and_not_places_in_the_row():
    position = RoPE(head_dim=HEAD_DIM, base=100.0, log_n="full", train_length=20)
    q, positions = vectors(6), torch.tensor([[3, 4, 5, 0, 1, 2]])
    (view,) = position(q, q, positions)
    assert torch.equal(view.q[0, 3], torch.zeros_like(view.q[0, 3]))  # one key is visible: its weight is 1 anyhow


@pytest.mark.parametrize(
    ("build_it", "reason"),
    [
        (lambda: RoPE(**{**ROPE, "head_dim": 15}), "head_dim=15"),
        (lambda: RoPE(**{**ROPE, "base": 1.0}), "base=1.0"),
        (lambda: NTKRoPE(**ROPE, factor=0.5), "factor=0.5"),
        (lambda: NTKRoPE(**{**ROPE, "head_dim": 2}, factor=2.0), "head_dim=2"),
        (lambda: NTKMixedRoPE(**ROPE, factor=2.0, exponent=1.5), "exponent=1.5"),
        (lambda: LinearScalingRoPE(**ROPE, factor=0.5), "factor=0.5"),
        (lambda: Llama3RoPE(**ROPE, **LLAMA3 | {"low_freq_factor": 4.0}, factor=8.0), "low_freq_factor=4.0"),
        (
            lambda: Llama3RoPE(**ROPE, **LLAMA3 | {"original_context_length": 0}, factor=8.0),
            "original_context_length=0",
        ),
        (lambda: YaRNRoPE(**ROPE, **YARN | {"beta_slow": 32.0}, factor=8.0), "beta_slow=32.0"),
        (lambda: YaRNRoPE(**ROPE, **YARN | {"attention_factor": 0.0}, factor=8.0), "attention_factor=0.0"),
        (lambda: ReRoPE(**ROPE, window=0), "window=0"),
        (lambda: LeakyReRoPE(**ROPE, window=4, slowdown=0.0), "slowdown=0.0"),
        (lambda: RoPE(**{**ROPE, "log_n": "full"}), "train_length=None"),
        (lambda: RoPE(**{**ROPE, "train_length": 64}), "train_length=64"),
    ],
)
def test_a_setting_without_meaning_is_refused_by_name(build_it, reason):
    with pytest.raises(ConfigError, match=reason):
        build_it()


def test_the_angle_memo_answers_anew_when_positions_change_in_place():
    memo, positions = AngleMemo(), torch.arange(4)[None].clone()
    frequencies = inverse_frequencies(head_dim=4, base=10.0)
    first = memo(positions, frequencies)
    assert memo(positions, frequencies) is first
    positions += 1
    assert not torch.equal(memo(positions, frequencies)[0], first[0])
