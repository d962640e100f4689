"""Muon on ranks that hold equal weights: the work is divided, and the update is that of one process, bit for bit."""

import threading

import pytest
import torch

from llm.optim import muon_ranks
from llm.optim.muon import Muon
from llm.optim.rank_shares import RankShares

SETTINGS = {
    "lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "iteration": "quintic",
    "update_scale": "match_adamw", "matmul_dtype": "float32", "by_head": False, "row_beta": None,
    "cautious_decay": False, "hyperball": False, "aux": "adamw", "aux_lr_scale": 1.0,
    "aux_betas": [0.9, 0.95], "aux_eps": 1e-8, "skip_idle_rows": True,
}  # fmt: skip
SHAPES = [(6, 4), (6, 4), (6, 4), (4, 8), (3, 4, 4), (8, 8)]


class ThreadShares(RankShares):
    """Ranks that are threads of this process."""

    def __init__(self, rank, size, board, barrier):
        self.rank, self.size, self.board, self.barrier = rank, size, board, barrier

    def exchange(self, sent):
        self.board[self.rank] = sent.clone()
        self.barrier.wait()
        found = [self.board[rank] for rank in range(self.size)]
        self.barrier.wait()
        return found


def trained(shares=None, steps=3, **settings):
    random = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]
    names = [f"w{i}" for i in range(len(SHAPES))]
    group = {"params": params, "names": names, "kind": "matrix", "lr": 0.02, "weight_decay": 0.1}
    optimizer = Muon([group | {"heads": [2, 1, 1, -2, 1, 1]}], **SETTINGS | settings)
    if shares is not None:
        optimizer.share_work(shares)
    for _ in range(steps):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=random)
        params[4].grad[1] = 0  # an idle expert
        optimizer.step()
    return [p.detach() for p in params], optimizer.state_dict()["state"]


def on_ranks(size, **settings):
    board, barrier, results = [None] * size, threading.Barrier(size, timeout=60), [None] * size

    def work(rank):
        results[rank] = trained(ThreadShares(rank, size, board, barrier), **settings)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("settings", [{}, {"by_head": True}, {"row_beta": 0.9}, {"matmul_dtype": "bfloat16"}], ids=str)
def test_ranks_that_share_the_work_have_the_weights_and_state_of_one_process(size, settings):
    weights, state = trained(**settings)
    for own_weights, own_state in on_ranks(size, **settings):
        for own, wanted in zip(own_weights, weights, strict=True):
            torch.testing.assert_close(own, wanted, rtol=0, atol=0)  # the same products of the same numbers
        for index, held in state.items():
            for name, value in held.items():
                torch.testing.assert_close(own_state[index][name], value, rtol=0, atol=0)


def test_each_matrix_is_orthogonalised_on_one_rank(monkeypatch):
    counted = []
    real = Muon.directions
    monkeypatch.setattr(
        Muon, "directions", lambda self, group, p, heads: counted.extend(p) or real(self, group, p, heads)
    )
    on_ranks(3, steps=2)
    assert len(counted) == 2 * len(SHAPES)
    assert muon_ranks.iteration_cost((6, 4)) == 96


def test_the_exchange_carries_bytes_of_half_precision():
    shares = ThreadShares(0, 1, [None], threading.Barrier(1))
    results = shares.gather(
        {0: torch.ones(2, 3, dtype=torch.bfloat16)}, [0], [torch.Size((2, 3))], torch.empty(0).bfloat16()
    )
    assert results[0].dtype == torch.bfloat16
    assert results[0].shape == (2, 3)
