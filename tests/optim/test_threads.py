import copy

import pytest
import torch

from llm.config.pieces import instantiate
from llm.optim.muon import Muon
from llm.optim.threads import side_by_side


@pytest.fixture
def threads():
    """Several threads for torch, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_item_is_processed_once_without_gradients(threads, count):
    weights = [torch.ones(4, requires_grad=True) for _ in range(count)]
    side_by_side(
        lambda weight: weight.add_(1.0), weights
    )  # a leaf that needs gradients may not be changed with them on
    assert all(torch.equal(weight, torch.full((4,), 2.0)) for weight in weights)
    assert torch.get_num_threads() == threads


def test_an_error_in_one_of_them_is_raised(threads):
    def work(item):
        if item == 2:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        side_by_side(work, range(4))
    assert torch.get_num_threads() == threads


def test_muon_gives_the_same_numbers_on_any_number_of_threads(zoo, groups_of, set_gradients, composed):
    node = composed("optimizer=muon")["optimizer"]
    other = copy.deepcopy(zoo)
    optimizers: list[Muon] = [instantiate(node)(groups_of(module, lr=0.01)) for module in (zoo, other)]
    before = torch.get_num_threads()
    try:
        for step in range(3):
            for module, optimizer, count in zip((zoo, other), optimizers, (1, 3), strict=True):
                set_gradients(module, step)
                torch.set_num_threads(count)
                optimizer.step()
    finally:
        torch.set_num_threads(before)
    for left, right in zip(zoo.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
