"""Flat shards that are cut by hand in one process: the arithmetic of slices, blocks and owners."""

import pytest
import torch

from llm.distributed.zero import state
from llm.errors import ConfigError, ShapeError
from llm.optim.blocks import as_blocks, from_blocks
from llm.optim.exchange import OwnerExchange, choose_owners
from llm.optim.lion import Lion
from llm.optim.muon import Muon
from llm.optim.muon_shards import iteration_cost
from llm.optim.sgd import SGD
from llm.optim.shard import ShardLayout, Slice, check_coverage, is_active, spans
from llm.optim.tiger import Tiger

MUON = {
    "lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "iteration": "quintic",
    "update_scale": "match_adamw", "matmul_dtype": "float32", "by_head": False, "row_beta": None,
    "cautious_decay": False, "hyperball": False, "aux": "adamw", "aux_lr_scale": 1.0,
    "aux_betas": [0.9, 0.95], "aux_eps": 1e-8, "skip_idle_rows": True,
}  # fmt: skip
TIGER = {
    "lr": 0.01, "weight_decay": 0.1, "beta": 0.9, "min_rms": 0.0, "min_rms_ratio": 0.5, "shrink_ratio": None,
    "accumulate": "buffer", "skip_idle_rows": True,
}  # fmt: skip
RULES = {
    "lion": lambda groups: Lion(groups, lr=0.01, weight_decay=0.1, betas=[0.9, 0.99], skip_idle_rows=True),
    "tiger": lambda groups: Tiger(groups, **TIGER),
    "tiger that shrinks": lambda groups: Tiger(groups, **TIGER | {"shrink_ratio": 0.9}),
    "muon": lambda groups: Muon(groups, **MUON),
    "muon by head": lambda groups: Muon(groups, **MUON | {"by_head": True}),
    "normuon": lambda groups: Muon(groups, **MUON | {"row_beta": 0.95}),
    "muon cautious": lambda groups: Muon(groups, **MUON | {"cautious_decay": True}),
    "muon on a sphere": lambda groups: Muon(undecayed(groups), **MUON | {"hyperball": True}),
    "muon on a sphere by head": lambda groups: Muon(undecayed(groups), **MUON | {"hyperball": True, "by_head": True}),
    "muon and lion": lambda groups: Muon(groups, **MUON | {"aux": "lion", "aux_eps": None}),
}


def undecayed(groups):
    return [group | {"weight_decay": 0.1 * (group["kind"] != "matrix")} for group in groups]


def whole_parameters():
    torch.manual_seed(0)
    shapes = {
        "matrix": {"a": (6, 4), "b": (4, 8), "experts": (3, 4, 4), "o_proj": (4, 8)},
        "embedding": {"tokens": (7, 4)},
        "head": {"head": (7, 4)},
        "vector": {"gain": (5,)},
    }
    heads = {"a": 2, "o_proj": -2}
    groups = []
    for kind, members in shapes.items():
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in members.values()]
        groups.append(
            {
                "params": params,
                "names": [*members],
                "kind": kind,
                "lr": 0.02,
                "weight_decay": 0.1,
                "heads": [heads.get(name, 1) for name in members],
                "resting_values": [0.5] * len(members),
            }
        )
    return groups


def flattened(groups):
    """The same groups as a strategy hands them over: one flat tensor each, here on one rank, with padding."""
    flat_groups, layouts = [], []
    for group in groups:
        values = [p.detach().flatten() for p in group["params"]]
        flat = torch.nn.Parameter(torch.cat([*values, torch.zeros(3)]))
        slices, offset = [], 0
        for name, parameter in zip(group["names"], group["params"], strict=True):
            slices.append(Slice(name, tuple(parameter.shape), 0, parameter.numel(), offset))
            offset += parameter.numel()
        layouts.append(ShardLayout(flat, [slices], rank=0, group=None))
        flat_groups.append({**group, "params": [flat]})
    return flat_groups, layouts


def gradients(groups, step):
    generator = torch.Generator().manual_seed(step)
    found = {}
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            found[name] = torch.randn(parameter.shape, generator=generator)
    found["tokens"][2] = 0  # a token that did not occur
    found["experts"][1] = 0  # an expert that no token chose
    found["o_proj"][:, :4] = 0  # a head without a gradient
    return found


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_steps_a_flat_shard_as_it_steps_whole_tensors(rule):
    whole = whole_parameters()
    flat, layouts = flattened(whole)
    one, other = RULES[rule](whole), RULES[rule](whole_parameters())
    for group, cut in zip(other.param_groups, flat, strict=True):
        group["params"] = cut["params"]
    other.attach_layouts(layouts)
    for step in range(4):
        given = gradients(whole, step)
        if "shrinks" in rule and step == 2:
            given["b"][0, 0] = float("nan")
        for group, layout in zip(whole, layouts, strict=True):
            for name, parameter in zip(group["names"], group["params"], strict=True):
                parameter.grad = given[name].clone()
            layout.flat.grad = torch.cat([*(given[n].flatten() for n in group["names"]), torch.zeros(3)])
        one.step()
        other.step()
    for group, layout in zip(whole, layouts, strict=True):
        for piece, parameter in zip(layout.slices, group["params"], strict=True):
            got = piece.of(layout.flat.detach()).view(piece.shape)
            # sums of squares are taken in another order; a sign never flips here
            torch.testing.assert_close(
                got, parameter.detach(), rtol=1e-5, atol=1e-6, msg=lambda m, p=piece: f"{p}: {m}"
            )
        assert torch.equal(layout.flat.detach()[-3:], torch.zeros(3)), "padding has moved"


@pytest.mark.parametrize("rule", ["muon", "lion", "tiger"])
def test_a_flat_shard_without_a_layout_is_refused(rule):
    optimizer = RULES[rule](whole_parameters())
    flat, layouts = flattened(whole_parameters())
    for group, cut in zip(optimizer.param_groups, flat, strict=True):
        group["params"] = cut["params"]
        group["params"][0].grad = torch.zeros_like(group["params"][0])
    with pytest.raises(ShapeError, match="tensors arrived merged into 1"):
        optimizer.step()
    optimizer.attach_layouts(layouts[:1])
    with pytest.raises(ShapeError, match="came without a layout"):
        optimizer.step()


def test_an_optimizer_without_support_for_shards_is_refused():
    class Stranger(SGD):
        is_elementwise = False

    flat, layouts = flattened(whole_parameters())
    optimizer = Stranger(whole_parameters(), lr=0.1, weight_decay=0.0, momentum=0.9)
    optimizer.attach_layouts(layouts)
    for group, cut in zip(optimizer.param_groups, flat, strict=True):
        group["params"] = cut["params"]
        group["params"][0].grad = torch.zeros_like(group["params"][0])
    with pytest.raises(ConfigError, match="cannot step sharded tensors"):
        optimizer.step()


@pytest.mark.parametrize("start", [0, 3, 4, 7])
@pytest.mark.parametrize("numel", [1, 2, 5, 9, 13])
def test_spans_cover_a_slice_once_and_never_cross_a_block(start, numel):
    piece = Slice("x", (10, 4), start, numel, 100)
    covered = []
    for span in spans(piece, 4):
        first = span.offset - 100 + start
        assert first // 4 == span.block
        assert span.num_blocks == 1 or span.length == 4 * span.num_blocks
        assert (first + span.length - 1) // 4 == span.block + span.num_blocks - 1
        covered += range(span.offset, span.offset + span.length)
    assert covered == list(range(100, 100 + numel))


def test_blocks_with_a_gradient_are_marked_whole():
    flat = torch.zeros(12)
    layout = ShardLayout(flat, [[Slice("x", (3, 4), 0, 12, 0)]], rank=0, group=None)
    gradient = torch.zeros(12)
    gradient[5] = 1e-30
    mask = layout.active_elements(gradient, {"x": 4})
    assert mask.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    assert layout.active_elements(torch.ones(12), {"x": 4}) is None
    assert is_active(torch.tensor([[float("nan")], [0.0]])).tolist() == [True, False]


def test_owners_share_the_work_evenly_and_the_same_on_every_rank():
    names = {f"m{i}": (8 * (1 + i % 4), 16) for i in range(16)}
    rows = [[Slice(n, shape, 0, 8, 0) for n, shape in names.items()] for _ in range(4)]
    owners = [
        choose_owners(ShardLayout(torch.zeros(1), rows, rank=rank, group=None), iteration_cost) for rank in range(4)
    ]
    assert all(o == owners[0] for o in owners)
    loads = [sum(iteration_cost(names[n]) for n, o in owners[0].items() if o == rank) for rank in range(4)]
    assert max(loads) <= 1.1 * sum(loads) / 4


def test_an_exchange_on_one_rank_applies_the_function_to_whole_tensors():
    flat = torch.arange(10.0)
    layout = ShardLayout(flat, [[Slice("a", (2, 3), 0, 6, 0), Slice("b", (2, 2), 0, 4, 6)]], rank=0, group=None)
    exchange = OwnerExchange(layout, cost=iteration_cost)
    out = exchange.map(flat, lambda name, whole: whole * (2 if name == "a" else 3), dtype=torch.float64)
    assert out.tolist() == [0, 2, 4, 6, 8, 10, 18, 21, 24, 27]
    assert out.dtype == torch.float64


@pytest.mark.parametrize(("shape", "heads"), [((6, 4), 1), ((6, 4), 3), ((4, 6), -2), ((3, 4, 5), 1)])
def test_blocks_can_be_put_back(shape, heads):
    whole = torch.randn(shape)
    assert torch.equal(from_blocks(as_blocks(whole, heads), heads, shape), whole)


@pytest.mark.parametrize(
    "rows",
    [
        [[Slice("x", (4,), 0, 2, 0)], [Slice("x", (4,), 3, 1, 0)]],
        [[Slice("x", (4,), 0, 3, 0)], [Slice("x", (4,), 2, 2, 0)]],
        [[Slice("x", (2, 2), 0, 4, 0)]],
        [[]],
    ],
    ids=["a gap", "an overlap", "another shape", "nothing"],
)
def test_shards_that_do_not_hold_each_element_once_are_refused(rows):
    with pytest.raises(ShapeError, match="DeepSpeed release"):
        check_coverage({"x": (4,)}, [ShardLayout(torch.zeros(4), rows, rank=0, group=None)])


def test_gathering_shards_receives_a_bounded_number_of_elements_for_any_number_of_ranks(monkeypatch):
    flat, received = torch.arange(40.0), []

    def gather(part, parts, dst, group):
        received.append(sum(arrived.numel() for arrived in parts))
        for rank, arrived in enumerate(parts):
            arrived.copy_(part + rank)

    monkeypatch.setattr(state, "GATHERED_AT_ONCE", 32)
    monkeypatch.setattr(state.dist, "gather", gather)
    shards = state.gather_flat(flat, ShardLayout(flat, [[] for _ in range(8)], rank=0, group=None))
    assert max(received) <= 32
    assert all(torch.equal(shard, flat + rank) for rank, shard in enumerate(shards))
