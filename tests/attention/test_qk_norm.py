"""The settings of the norm of queries and keys, which every attention has but delta, whose keys have unit length."""

import pytest
import torch
from attention_pairs import VALID_PAIRS, build_pair
from catalogue import options

POSITION_OF = dict(reversed(VALID_PAIRS))


@pytest.mark.parametrize("attention", sorted(set(options("model/attention")) - {"delta"}))
def test_the_eps_of_qk_norm_is_a_setting(attention):
    x = 1e-3 * torch.randn(1, 5, 48)
    lengths = []
    for eps in (1e-6, 1e-2):
        layer = build_pair(attention, POSITION_OF[attention], qk_norm=True, qk_norm_eps=eps)
        assert layer.q_norm.eps == layer.k_norm.eps == eps
        lengths.append(layer.project(x)[0].norm().item())
    assert lengths[1] < 0.5 * lengths[0]
