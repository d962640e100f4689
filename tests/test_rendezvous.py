import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm.distributed.launch import Launch
from llm.distributed.rendezvous import agree, smallest


@pytest.fixture
def address(monkeypatch):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))


def test_ranks_take_the_smallest_of_their_numbers_and_what_the_first_says(address):
    def rank(number):
        launch = Launch("train.py", number, 3, 3)
        return smallest([8, 2, 4][number], launch, about="size"), agree(f"said by {number}", launch)

    with ThreadPoolExecutor(3) as ranks:
        assert list(ranks.map(rank, range(3))) == [(2, "said by 0")] * 3


def test_a_single_rank_does_not_communicate():
    launch = Launch("torchrun", 0, 1, 1)
    assert smallest(8, launch, about="size") == 8
    assert agree("mine", launch) == "mine"
