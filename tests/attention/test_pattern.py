"""Hybrids: layers alternate between kinds of attention."""

import math

import pytest
import torch

from llm.config.build import build_model
from llm.config.check import check
from llm.errors import ConfigError
from llm.model.attention.linear import LinearAttention
from llm.model.attention.softmax import SoftmaxAttention
from llm.model.attention.vq import VQAttention
from llm.model.position.none import NoPosition
from llm.model.position.rerope import LeakyReRoPE
from llm.model.position.rope import RoPE


def build(composed, *overrides):
    return build_model(composed("model=hybrid", "context_length=64", *overrides), 100)


def test_layers_take_turns_through_the_pattern(composed):
    model = build(composed, "model/position=rerope", "model.attention.pattern=[vq,softmax,local]", "model.num_layers=5")
    kinds = [type(layer.attention) for layer in model.layers]
    assert kinds == [VQAttention, SoftmaxAttention, SoftmaxAttention, VQAttention, SoftmaxAttention]
    assert [layer.attention.layer_index for layer in model.layers] == [0, 1, 2, 3, 4]
    windows = [layer.attention.window for layer in model.layers]
    assert windows == [None, None, 96, None, None]


def test_layers_of_one_kind_share_no_weights(composed):
    model = build(composed, "model.attention.pattern=[linear]")
    first, second = model.layers[0].attention, model.layers[1].attention
    assert isinstance(first, LinearAttention)
    assert first.q_proj.weight is not second.q_proj.weight


def test_decoding_a_hybrid_with_caches_equals_the_full_forward(composed):
    model = build(composed, "model.attention.pattern=[local,linear,performer,softmax]").eval()
    ids, positions = torch.randint(100, (2, 90)), torch.arange(90).expand(2, -1)
    full = model(ids, positions=positions).hidden
    caches = model.new_caches(batch=2, max_length=90, dtype=torch.float32)
    with torch.no_grad():
        parts = [
            model(ids[:, a:b], positions=positions[:, a:b], caches=caches).hidden
            for a, b in ((0, 70), (70, 71), (71, 90))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-4, rtol=1e-3)  # four layers of fp32 sums


@pytest.mark.parametrize(("pattern", "reason"), [("[vqq]", "did you mean vq"), ("[]", "names no kind")])
def test_a_pattern_that_names_no_kind_is_refused(composed, pattern, reason):
    with pytest.raises(ConfigError, match=reason):
        check(composed("model=hybrid", f"model.attention.pattern={pattern}"))


def test_an_invalid_pair_inside_a_pattern_is_refused_with_the_reason(composed):
    with pytest.raises(ConfigError, match="each code occurred"):
        check(composed("model=hybrid", "model.attention.pattern=[softmax,vq]"))


def test_each_kind_may_have_a_position_of_its_own(composed):
    model = build(
        composed, "model.attention.pattern=[local,softmax]", "model.num_layers=4",
        "model/position@model.attention.positions.softmax=none",
        "model/position@model.attention.positions.local=leaky_rerope", "model.attention.positions.local.window=7",
        "model.attention.positions.local.base=500",
    )  # fmt: skip
    positions = [layer.attention.position for layer in model.layers]
    assert [type(p) for p in positions] == [LeakyReRoPE, NoPosition, LeakyReRoPE, NoPosition]
    assert (positions[0].window, float(positions[0].frequencies[1])) == (7, pytest.approx(500 ** (-2 / 32)))


def test_a_kind_without_a_position_of_its_own_has_that_of_the_model(composed):
    model = build(
        composed, "model.attention.pattern=[local,softmax]", "model/position@model.attention.positions.softmax=none"
    )
    assert model.layers[0].attention.position is model.position
    assert type(model.position) is RoPE
    torch.manual_seed(0)
    ids = torch.randint(0, 100, (1, 20))
    same = build(composed, "model.attention.pattern=[local,softmax]")
    positions = torch.arange(20)[None]
    model.load_state_dict(same.state_dict())
    other, own = (m(ids, positions=positions).hidden for m in (model, same))
    assert (other - own).abs().max() > 1e-3


def test_a_context_is_as_long_as_the_layer_that_reads_least(composed):
    pattern = "model.attention.pattern=[local,softmax]"
    assert build(composed, pattern, "model/position=rerope").reach(64) == math.inf
    own = "model/position@model.attention.positions.local=rope"
    assert build(composed, pattern, "model/position=rerope", own).reach(64) == 64


def test_a_position_of_a_kind_that_does_not_exist_is_refused(composed):
    with pytest.raises(
        ConfigError, match=r"model\.attention\.positions=.*vqq is not in model.attention.kinds; did you"
    ):
        build(composed, "+model/position@model.attention.positions.vqq=none")
