import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data.packing import pack

BOS = 9
windows = st.integers(1, 64).flatmap(
    lambda time: arrays(np.int64, st.tuples(st.integers(1, 4), st.just(time + 1)), elements=st.integers(0, BOS))
)


def slow_pack(window: list[int]) -> tuple[list[int], list[int]]:
    """One token at a time: the definition of document_ids and positions."""
    ids, positions = [], []
    document, position = 0, -1
    for token in window[:-1]:
        position += 1
        if token == BOS:
            document, position = document + 1, 0
        ids.append(document)
        positions.append(position)
    return ids, positions


@given(windows)
def test_documents_and_positions_equal_counting_one_token_at_a_time(window):
    batch = pack(window, bos_id=BOS)
    for row in range(len(window)):
        ids, positions = slow_pack(window[row].tolist())
        assert batch["document_ids"][row].tolist() == ids
        assert batch["positions"][row].tolist() == positions


@given(windows)
def test_labels_are_the_inputs_shifted_by_one(window):
    batch = pack(window, bos_id=BOS)
    assert torch.equal(batch["input_ids"], torch.from_numpy(window[:, :-1].copy()))
    assert torch.equal(batch["labels"], torch.from_numpy(window[:, 1:].copy()))


@given(windows)
def test_equal_document_ids_never_span_the_beginning_of_a_document(window):
    batch = pack(window, bos_id=BOS)
    begins = batch["input_ids"] == BOS
    steps = batch["document_ids"].diff(dim=1)
    assert torch.equal(steps == 1, begins[:, 1:])
    assert bool(((batch["positions"] == 0)[:, 1:] == begins[:, 1:]).all())


def test_the_unscored_bit_hides_labels_and_leaves_inputs_alone():
    hidden = 1 << 15
    batch = pack(np.array([[BOS, 3 | hidden, 4, 5 | hidden]]), bos_id=BOS, unscored_bit=hidden)
    assert batch["input_ids"].tolist() == [[BOS, 3, 4]]
    assert batch["labels"].tolist() == [[-100, 4, -100]]
