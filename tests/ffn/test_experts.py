import itertools

import pytest
import torch

from llm.model.ffn.expert_counts import expert_counts
from llm.model.ffn.experts import Experts, loop_over_tokens
from llm.model.ffn.grouped import grouped_products
from llm.model.ffn.routing import ExpertOrder, Routing, sort_by_expert
from llm.ops.situ import Caps


def make_experts(
    *, num_experts=5, d_model=12, d_expert=7, top_k=2, normalize_outputs=False, caps=None, dtype=torch.float64
):
    return Experts(
        d_model=d_model,
        d_expert=d_expert,
        num_experts=num_experts,
        top_k=top_k,
        normalize_outputs=normalize_outputs,
        caps=caps,
    ).to(dtype)


def random_routing(tokens, *, num_experts, slots, empty=False, dtype=torch.float64):
    ids = torch.stack([torch.randperm(num_experts)[:slots] for _ in range(tokens)])
    weights = torch.rand(tokens, slots, dtype=dtype)
    if empty:
        is_empty = torch.rand(tokens, slots) < 0.4
        ids, weights = ids.masked_fill(is_empty, num_experts), weights.masked_fill(is_empty, 0)
    logits = torch.randn(tokens, num_experts, dtype=dtype)
    return Routing(ids, weights.requires_grad_(), logits, logits.softmax(-1))


def outputs_and_gradients(run, experts, x, routing):
    x = x.clone().requires_grad_()
    weights = routing.gate_weights.detach().clone().requires_grad_()
    y = run(x, routing._replace(gate_weights=weights), experts)
    torch.manual_seed(1)
    inputs = [x, weights, *experts.parameters()]
    slope = torch.randn(y.shape).to(y.dtype)  # drawn in one dtype: torch 2.11 draws other numbers in bfloat16
    return [y, *torch.autograd.grad((y * slope).sum(), inputs)]


def fast(x, routing, experts):
    return experts(x, routing, has_empty_slots=True)[0]


@pytest.mark.parametrize("tokens", [1, 2, 63])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("caps", [None, Caps(0.7, 1.5)])
def test_outputs_and_gradients_equal_the_loop_over_tokens(tokens, slots, empty, normalize, caps):
    experts = make_experts(normalize_outputs=normalize, caps=caps)
    x = torch.randn(tokens, 12, dtype=torch.float64)
    routing = random_routing(tokens, num_experts=5, slots=slots, empty=empty)
    expected = outputs_and_gradients(loop_over_tokens, experts, x, routing)
    for value, truth in zip(outputs_and_gradients(fast, experts, x, routing), expected, strict=True):
        # the same sums in another order, in fp64: a few units of 1e-16; normalised outputs divide by small norms
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-12)


def test_experts_without_a_token_have_zero_gradients():
    experts = make_experts()
    routing = random_routing(9, num_experts=2, slots=1)
    _, _, _, *weight_gradients = outputs_and_gradients(
        fast, experts, torch.randn(9, 12, dtype=torch.float64), routing._replace(probabilities=torch.rand(9, 5))
    )
    for gradient in weight_gradients:
        assert gradient[:2].abs().amin(dim=0).max() > 0
        assert (gradient[2:] == 0).all()


@pytest.mark.parametrize(("num_experts", "slots"), [(4, 2), (12, 9)])  # summed in one group, and in three
def test_bf16_stays_within_its_rounding_of_fp32(num_experts, slots):
    experts = make_experts(num_experts=num_experts, d_model=64, d_expert=48, dtype=torch.float32)
    x = torch.randn(200, 64)
    routing = random_routing(200, num_experts=num_experts, slots=slots, dtype=torch.float32)
    expected = outputs_and_gradients(fast, experts, x, routing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = outputs_and_gradients(fast, experts, x, routing)
    for value, truth in zip(rounded, expected, strict=True):
        error = (value.float() - truth).norm() / truth.norm()
        assert error < 0.02  # eight bits of mantissa, 2^-8 = 0.004 each rounding, about ten roundings in quadrature


def test_gradients_keep_the_precision_of_the_weights_under_autocast():
    experts = make_experts(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fast(torch.randn(6, 12), random_routing(6, num_experts=5, slots=2, dtype=torch.float32), experts)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in experts.parameters())


def test_permuting_tokens_permutes_outputs_exactly():
    experts = make_experts()
    x = torch.randn(63, 12, dtype=torch.float64)
    routing = random_routing(63, num_experts=5, slots=2)
    order = torch.randperm(63)
    permuted = Routing(*(part[order] for part in routing))
    # products of other shapes add in another order: fp64 rounding
    torch.testing.assert_close(fast(x, routing, experts)[order], fast(x[order], permuted, experts), rtol=0, atol=1e-13)


@pytest.mark.parametrize("empty", [False, True])
def test_sorted_rows_visit_each_filled_slot_once_and_counts_are_exact(empty):
    routing = random_routing(50, num_experts=7, slots=3, empty=empty)
    order = sort_by_expert(routing.expert_ids, 7)
    assert sorted(order.slot_ids.tolist()) == list(range(150))
    assert (order.slot_ids[order.rows()] == torch.arange(150)).all()
    assert (order.token_ids == order.slot_ids // 3).all()
    expected = [int((routing.expert_ids == e).sum()) for e in range(7)]
    assert expert_counts(routing.expert_ids, 7).tolist() == expected
    start = 0
    for expert, end in enumerate(order.offsets.tolist()):
        assert (routing.expert_ids.flatten()[order.slot_ids[start:end]] == expert).all()
        assert end - start == expected[expert]
        start = end


@pytest.mark.parametrize("caps", [None, Caps(0.7, 1.5)])
def test_grouped_products_equal_the_loop_over_experts(caps):
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped products")
    experts = make_experts(num_experts=5, d_model=16, d_expert=8, caps=caps, dtype=torch.float32)

    def grouped(x, routing, experts):
        order = sort_by_expert(routing.expert_ids, 5)
        weights = routing.gate_weights.flatten()[order.slot_ids, None]
        stacks = (experts.gate_proj.weight, experts.up_proj.weight, experts.down_proj.weight)
        return grouped_products(x, weights, order, *stacks, True, experts.caps)[0]

    for empty in (False, True):
        routing = random_routing(63, num_experts=5, slots=2, empty=empty, dtype=torch.float32)
        x = torch.randn(63, 16)
        expected = outputs_and_gradients(fast, experts, x, routing)
        for value, truth in zip(outputs_and_gradients(grouped, experts, x, routing), expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-5)  # fp32 sums of 16 to 63 terms


class UnwrittenProduct(torch.autograd.Function):
    """A grouped product that leaves NaN where a GPU's kernel writes nothing, in both directions."""

    @staticmethod
    def forward(ctx, rows, stack, offsets):
        ctx.save_for_backward(rows, stack, offsets)
        out = rows.new_full((len(rows), stack.shape[-1]), float("nan"))
        for expert, (start, end) in enumerate(itertools.pairwise([0, *offsets.tolist()])):
            out[start:end] = rows[start:end] @ stack[expert]
        return out

    @staticmethod
    def backward(ctx, grad):
        rows, stack, offsets = ctx.saved_tensors
        d_rows, d_stack = torch.full_like(rows, float("nan")), torch.full_like(stack, float("nan"))
        for expert, (start, end) in enumerate(itertools.pairwise([0, *offsets.tolist()])):
            d_rows[start:end] = grad[start:end] @ stack[expert].T
            if end > start:
                d_stack[expert] = rows[start:end].T @ grad[start:end]
        return d_rows, d_stack, None


def test_memory_that_grouped_products_leave_unwritten_reaches_no_result(monkeypatch):
    monkeypatch.setattr(
        "llm.model.ffn.grouped.F.grouped_mm",
        lambda rows, stack, offs: UnwrittenProduct.apply(rows, stack, offs),
        raising=False,
    )
    experts = make_experts(num_experts=5, d_model=16, d_expert=8, dtype=torch.float32)
    routing = random_routing(63, num_experts=5, slots=2, empty=True, dtype=torch.float32)
    routing = routing._replace(expert_ids=routing.expert_ids.masked_fill(routing.expert_ids == 2, 1))  # 2 has no token

    def grouped(x, routing, experts):
        order = sort_by_expert(routing.expert_ids, 5)
        assert order.offsets[-1] < len(order.slot_ids)
        weights = routing.gate_weights.flatten()[order.slot_ids, None]
        stacks = (experts.gate_proj.weight, experts.up_proj.weight, experts.down_proj.weight)
        return grouped_products(x, weights, order, *stacks, True, experts.caps)[0]

    x = torch.randn(63, 16)
    expected = outputs_and_gradients(fast, experts, x, routing)
    for value, truth in zip(outputs_and_gradients(grouped, experts, x, routing), expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-5)  # fp32 sums of 16 to 63 terms


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped products")
@pytest.mark.parametrize("empty", [False, True])
def test_grouped_products_in_bf16_keep_torchs_rules_of_shape_and_alignment(empty):
    """Forward and backward without storage: torch holds the rules of its GPU kernel against shapes and strides."""
    shapes = {"x": (256, 64), "weights": (512, 1), "gate": (6, 48, 64), "up": (6, 48, 64), "down": (6, 64, 48)}
    tensors = {name: torch.empty(shape, device="meta", requires_grad=True) for name, shape in shapes.items()}
    x, weights, *stacks = tensors.values()
    rows, offsets = torch.empty(512, dtype=torch.long, device="meta"), torch.empty(6, dtype=torch.int32, device="meta")
    order = ExpertOrder(token_ids=rows, slot_ids=rows, offsets=offsets)
    y, _ = grouped_products(x.bfloat16(), weights, order, *stacks, empty)
    assert (y.shape, y.dtype) == (x.shape, torch.bfloat16)
    y.sum().backward()
    assert all(t.grad is not None and (t.grad.shape, t.grad.dtype) == (t.shape, t.dtype) for t in tensors.values())


def test_the_operator_passes_the_checks_of_torch():
    experts = make_experts(num_experts=3, d_model=4, d_expert=5)
    order = sort_by_expert(random_routing(7, num_experts=3, slots=2).expert_ids, 3)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(14, 1, dtype=torch.float64, requires_grad=True)
    stacks = [experts.gate_proj.weight, experts.up_proj.weight, experts.down_proj.weight]
    arguments = (x, weights, order.token_ids, order.offsets, *stacks)
    torch.library.opcheck(torch.ops.crucible.expert_loop.default, arguments)
    torch.library.opcheck(torch.ops.crucible.expert_loop.default, (*arguments, 0.7, 1.5))
    assert torch.autograd.gradcheck(lambda *a: torch.ops.crucible.expert_loop(*a, 0.7, 1.5)[0], arguments)
    assert torch.autograd.gradcheck(lambda *a: torch.ops.crucible.expert_loop(*a)[0], arguments)
