"""The contract of positions, held against every option of conf/model/position."""

import pytest
import torch
from catalogue import build_piece, options

from llm.position.rope import RoPE
from llm.position.rotary import AngleMemo, inverse_frequencies

HEAD_DIM = 16


def build(name):
    return build_piece("model/position", name, head_dim=HEAD_DIM)


def scores(position, q, k, offset):
    time = q.shape[1]
    views = position(q, k, torch.arange(time).expand(q.shape[0], -1) + offset)
    distance = torch.arange(time)[:, None] - torch.arange(time)[None, :]
    answer = torch.zeros(q.shape[0], q.shape[2], time, time, dtype=q.dtype)
    for view in views:
        dots = torch.einsum("bihd,bjhd->bhij", view.q, view.k)
        answer = torch.where(distance >= view.min_distance, dots, answer)
    return answer.tril()


@pytest.mark.parametrize("name", options("model/position"))
@pytest.mark.parametrize("time", [1, 63])
def test_views_keep_shape_and_dtype(name, time):
    q, k = torch.randn(2, time, 4, HEAD_DIM), torch.randn(2, time, 2, HEAD_DIM)
    for view in build(name)(q, k, torch.arange(time).expand(2, -1)):
        assert view.q.shape == q.shape
        assert view.k.shape == k.shape
        assert view.q.dtype == q.dtype


@pytest.mark.parametrize("name", options("model/position"))
def test_scores_depend_on_distance_only(name):
    position = build(name)
    q, k = torch.randn(1, 33, 2, HEAD_DIM, dtype=torch.float64), torch.randn(1, 33, 2, HEAD_DIM, dtype=torch.float64)
    near, far = scores(position, q, k, 0), scores(position, q, k, 1000)
    # angles are fp32: 1000 rad carries 6e-5 rad of rounding, times |q||k| of about 16
    torch.testing.assert_close(near, far, atol=5e-3, rtol=0)


def test_rope_equals_its_definition_pair_by_pair():
    q = torch.randn(1, 5, 1, HEAD_DIM, dtype=torch.float64)
    frequencies = inverse_frequencies(head_dim=HEAD_DIM, base=100.0)
    (view,) = RoPE(head_dim=HEAD_DIM, base=100.0)(q, q, torch.arange(5)[None])
    for p in range(5):
        for m in range(HEAD_DIM // 2):
            turn = torch.polar(torch.ones(()).double(), p * frequencies[m])
            turned = torch.complex(q[0, p, 0, m], q[0, p, 0, m + HEAD_DIM // 2]) * turn
            # rotation runs in fp32
            torch.testing.assert_close(view.q[0, p, 0, m], turned.real, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(view.q[0, p, 0, m + HEAD_DIM // 2], turned.imag, atol=1e-6, rtol=1e-5)


def test_the_angle_memo_answers_anew_when_positions_change_in_place():
    memo, positions = AngleMemo(), torch.arange(4)[None].clone()
    frequencies = inverse_frequencies(head_dim=4, base=10.0)
    first = memo(positions, frequencies)
    assert memo(positions, frequencies) is first
    positions += 1
    assert not torch.equal(memo(positions, frequencies)[0], first[0])
