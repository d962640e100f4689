"""Hybrids: layers take turns between kinds of attention."""

import pytest
import torch

from llm.config.build import build_model
from llm.config.check import check
from llm.errors import ConfigError
from llm.model.attention.linear import LinearAttention
from llm.model.attention.softmax import SoftmaxAttention
from llm.model.attention.vq import VQAttention


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


def test_a_hybrid_decodes_as_it_reads(composed):
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


def test_an_illegal_pair_inside_a_pattern_is_refused_with_the_reason(composed):
    with pytest.raises(ConfigError, match="each code occurred"):
        check(composed("model=hybrid", "model.attention.pattern=[softmax,vq]"))
