from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from llm.model.attention.kernels.query_blocks import plan_row, plan_rows
from llm.model.attention.kernels.reference import visible_keys
from llm.ops.kernel_choice import DEFAULT, using


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    behind=st.integers(0, 100),
    window=st.none() | st.integers(1, 60),
    block=st.integers(1, 70),
)
def test_every_visible_pair_is_planned_and_every_unmasked_block_is_causal(lengths, behind, window, block):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    time_k = ids.shape[1]
    time = max(1, time_k - behind)
    boundaries = [int(n) for n in torch.tensor(lengths).cumsum(0)[:-1]]
    visible = visible_keys(time=time, time_k=time_k, device=ids.device, document_ids=ids, window=window)[0]
    blocks = plan_row(boundaries, time=time, time_k=time_k, window=window, block=block)
    assert [b.start for b in blocks] + [time] == [0] + [b.stop for b in blocks]
    for b in blocks:
        assert 0 < b.stop - b.start <= block
        assert b.key_stop == time_k - time + b.stop
        part = visible[b.start : b.stop]
        assert part.sum() == part[:, b.key_start : b.key_stop].sum()
        if not b.is_masked:
            hidden = (~part[:, b.key_start : b.key_stop]).sum()
            assert hidden == (b.stop - b.start) * (b.stop - b.start - 1) // 2


def test_documents_cost_no_more_than_one_long_document():
    whole = plan_row([], time=1024, time_k=1024, window=None, block=128)
    for boundaries in ([512], [1], [1023], [100, 500, 900], list(range(40, 1024, 40))):
        cut = plan_row(boundaries, time=1024, time_k=1024, window=None, block=128)
        area = [sum((b.stop - b.start) * (b.key_stop - b.key_start) for b in plan) for plan in (cut, whole)]
        assert area[0] <= area[1]
        assert not any(b.is_masked for b in cut if b.stop - b.start > 71)


def test_rows_with_documents_at_the_same_tokens_are_computed_together_and_short_rows_always():
    ids = torch.tensor([[0, 0, 1, 1], [5, 5, 5, 5], [3, 3, 4, 4], [0, 0, 0, 0]])
    sizes = {"batch": 4, "time": 4, "time_k": 4, "window": None, "block": 2}
    (plan,) = plan_rows(ids, **sizes)
    assert (plan.rows, plan.is_uniform, [b.is_masked for b in plan.blocks]) == ([0, 1, 2, 3], False, [False, True])
    with using(replace(DEFAULT, short_row=0)):
        plans = plan_rows(ids, **sizes)
    assert sorted(plan.rows for plan in plans) == [[0, 2], [1, 3]]
    assert all(plan.is_uniform and not any(b.is_masked for b in plan.blocks) for plan in plans)
