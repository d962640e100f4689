"""Muon with `by_head` on every attention with grouped heads: its updates equal a loop over heads, also on shards."""

import threading

import pytest
import torch
import torch.distributed as dist
from attention_pairs import GEOMETRY, VALID_PAIRS, build_pair
from catalogue import build_piece, options

from llm.optim.newton_schulz import newton_schulz_reference
from llm.optim.param_groups import build_param_groups
from llm.optim.shard import ShardLayout, Slice

POSITION_OF = dict(reversed(VALID_PAIRS))
LR, DECAY, MOMENTUM = 0.1, 0.5, 0.95
STEPS = 2
every_attention = pytest.mark.parametrize("attention", options("model/attention"))


def seeded(attention):
    torch.manual_seed(0)
    return build_pair(attention, POSITION_OF[attention])


def projections(layer):
    return {name: p for name, p in layer.named_parameters() if name.endswith("_proj.weight")}


def gradients(layer, step):
    generator = torch.Generator().manual_seed(step)
    # heads of different sizes: orthogonalised together, the largest one would decide
    return {
        name: torch.randn(p.shape, generator=generator) * torch.logspace(-1, 1, p.numel()).view(p.shape)
        for name, p in layer.named_parameters()
    }


def muon(groups):
    settings = {"by_head": True, "matmul_dtype": "float32", "iteration": "quintic", "update_scale": "match_adamw"}
    return build_piece("optimizer", "muon", params=groups, lr=LR, weight_decay=DECAY, **settings, momentum=MOMENTUM)


def direction(head):
    """The slow definition for one head: Newton-Schulz in fp64 on the wide side, with the scale of its shape."""
    wide = head.mT if head.shape[0] > head.shape[1] else head
    out = newton_schulz_reference(wide.double(), iteration="quintic").float()
    return 0.2 * max(head.shape) ** 0.5 * (out.mT if head.shape[0] > head.shape[1] else out)


def by_a_loop_over_heads(layer):
    """Return the projections after STEPS updates, each head orthogonalised on its own."""
    queries, keys = GEOMETRY.num_heads, GEOMETRY.num_kv_heads
    cuts = {"q_proj": (queries, 0), "k_proj": (keys, 0), "v_proj": (keys, 0), "o_proj": (queries, 1)}
    weights = {name: p.detach().clone() for name, p in projections(layer).items()}
    momenta = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(STEPS):
        given = gradients(layer, step)
        for name, weight in weights.items():
            count, axis = cuts[name.removesuffix(".weight")]
            momenta[name] = MOMENTUM * momenta[name] + (1 - MOMENTUM) * given[name]
            ahead = (1 - MOMENTUM) * given[name] + MOMENTUM * momenta[name]
            update = torch.cat([direction(head) for head in ahead.chunk(count, axis)], axis)
            weights[name] = weight * (1 - LR * DECAY) - LR * update
    return weights


def stepped(layer):
    """Return the projections after STEPS updates of the optimizer."""
    optimizer = muon(build_param_groups(layer, lr=LR, weight_decay=DECAY))
    for step in range(STEPS):
        for (_, p), gradient in zip(layer.named_parameters(), gradients(layer, step).values(), strict=True):
            p.grad = gradient
        optimizer.step()
    return {name: p.detach() for name, p in projections(layer).items()}


@every_attention
def test_an_update_equals_a_loop_over_heads(attention):
    expected = by_a_loop_over_heads(seeded(attention))
    assert set(expected) == {f"{name}_proj.weight" for name in "qkvo"}
    for name, weight in stepped(seeded(attention)).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


class Rank:
    """The process group of one rank that runs as a thread, with collectives through a common board."""

    def __init__(self, index, board, barrier):
        self.index, self.board, self.barrier = index, board, barrier

    def swap(self, given):
        """Return what every rank gave."""
        self.board[self.index] = given
        self.barrier.wait()
        all_given = list(self.board)
        self.barrier.wait()
        return all_given

    @staticmethod
    def all_reduce(values, op, group):
        stacked = torch.stack(group.swap(values.clone()))
        values.copy_(stacked.amax(0) if op == dist.ReduceOp.MAX else stacked.sum(0))

    @staticmethod
    def all_to_all(arrived, sent, sizes, sent_sizes, group):
        parts = [parts[group.index] for parts in group.swap(sent.split(sent_sizes))]
        arrived.copy_(torch.cat(parts))


def shards_of(group, num_ranks):
    """Return the flat shard of each rank, equal in length, and the table of their slices; heads are cut anywhere."""
    flat = torch.cat([p.detach().flatten() for p in group["params"]])
    length = -(-len(flat) // num_ranks)
    flat = torch.cat([flat, torch.zeros(num_ranks * length - len(flat))])
    table = [[] for _ in range(num_ranks)]
    begin = 0
    for name, p in zip(group["names"], group["params"], strict=True):
        for rank, rows in enumerate(table):
            low, high = max(begin, rank * length), min(begin + p.numel(), (rank + 1) * length)
            if low < high:
                rows.append(Slice(name, tuple(p.shape), low - begin, high - low, low - rank * length))
        begin += p.numel()
    return [part.clone() for part in flat.split(length)], table


def run_rank(rank, layer, found):
    """Train this rank's shards of a copy of the layer, and write its slices of the projections into `found`."""
    groups = build_param_groups(layer, lr=LR, weight_decay=DECAY)
    optimizer, layouts = muon(groups), []
    for group in optimizer.param_groups:
        flats, table = shards_of(group, len(rank.board))
        group["params"] = [torch.nn.Parameter(flats[rank.index])]
        layouts.append(ShardLayout(group["params"][0], table, rank=rank.index, group=rank))
    optimizer.attach_layouts(layouts)
    for step in range(STEPS):
        given = gradients(layer, step)
        for layout in layouts:
            layout.flat.grad = torch.zeros_like(layout.flat)
            for piece in layout.slices:
                piece.of(layout.flat.grad).copy_(given[piece.name].flatten()[piece.start : piece.start + piece.numel])
        optimizer.step()
    for layout in layouts:
        for piece in layout.slices:
            if piece.name in found:
                found[piece.name].view(-1)[piece.start : piece.start + piece.numel] = piece.of(layout.flat.detach())


@every_attention
def test_shards_of_three_ranks_are_updated_as_whole_projections(attention, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", Rank.all_reduce)
    monkeypatch.setattr(dist, "all_to_all_single", Rank.all_to_all)
    expected = stepped(seeded(attention))
    found = {name: torch.full_like(weight, float("nan")) for name, weight in expected.items()}
    board, barrier = [None] * 3, threading.Barrier(3, timeout=60)
    layers = [seeded(attention) for _ in range(3)]  # the seed belongs to the process, not to a thread
    ranks = [
        threading.Thread(target=run_rank, args=(Rank(index, board, barrier), layer, found))
        for index, layer in enumerate(layers)
    ]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
