"""Each device computes the same: models, experts and optimizers as fp64 on the CPU, runs as eager fp32 there.

Each test runs on the CPU and, if there is one, on a CUDA device; `pytest -m gpu` runs the latter only.
"""

import copy
import json

import pytest
import torch
from attention_pairs import VALID_PAIRS
from catalogue import build_piece, options
from torch import nn

from llm.config.build import build_model
from llm.model.ffn.experts import Experts, loop_over_tokens
from llm.model.ffn.routing import Routing
from llm.ops.loss import linear_cross_entropy
from llm.training.train import train

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)][: 1 + torch.cuda.is_available()]
RUNS = [("cpu", False), *(pytest.param("cuda", c, marks=pytest.mark.gpu) for c in (False, True))]
VOCAB = 61
SMALL = ("model.d_model=64", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn.d_ff=96")
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Relative error of a gradient after two layers: about twenty roundings of 2^-24 or 2^-8, and a margin for sums."""
IN_FP32 = ("vq", "delta")
CASES = [(*pair, dtype) for pair in VALID_PAIRS for dtype in ([torch.float32] if pair[0] in IN_FP32 else ROUNDING)]
"""VQ is compared in fp32 only, because a key rounded to bf16 may be nearest to another code. Delta divides each output
by its length, which is near 0 where a document's first query and key are nearly orthogonal."""


def loss_and_gradients(model, device, dtype):
    """Return the loss on a fixed batch with two documents per row and all gradients, as fp64 on the CPU."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (2, 81), generator=generator)
    documents = (torch.arange(80) >= 33).long().expand(2, 80)
    positions = torch.where(documents == 1, torch.arange(80) - 33, torch.arange(80))
    model = copy.deepcopy(model).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    inputs, labels, documents, positions = (t.to(device) for t in (ids[:, :-1], ids[:, 1:], documents, positions))
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(inputs, positions=positions, document_ids=documents)
        loss = linear_cross_entropy(out.hidden, model.lm_head.weight, labels) + sum(out.losses.values())
    loss.backward()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def assert_same_to_rounding(model, device, dtype):
    expected, truths = loss_and_gradients(model, "cpu", torch.float64)
    loss, gradients = loss_and_gradients(model, device, dtype)
    assert loss == pytest.approx(expected, rel=ROUNDING[dtype])
    assert gradients.keys() == truths.keys()
    everything = torch.cat([t.flatten() for t in truths.values()]).norm()
    for name, truth in truths.items():
        error = (gradients[name] - truth).norm() / (truth.norm() + 1e-3 * everything)
        assert error < ROUNDING[dtype], name


on_each_device = pytest.mark.parametrize("device", DEVICES)
in_each_precision = pytest.mark.parametrize("dtype", list(ROUNDING), ids=["fp32", "bf16"])


@on_each_device
@pytest.mark.parametrize(("attention", "position", "dtype"), CASES)
def test_a_model_of_every_attention_and_position_equals_its_definition_in_fp64(
    composed, device, attention, position, dtype
):
    choice = [f"model/attention={attention}", f"model/position={position}"]
    train_length = ["model.position.train_length=40"] if position == "inv_leaky" else []
    assert_same_to_rounding(build_model(composed(*SMALL, *choice, *train_length), VOCAB), device, dtype)


@on_each_device
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_delta_in_bf16_equals_its_definition_where_no_output_is_near_zero(composed, device, gate):
    choice = ["model/attention=delta", "model/position=none", f"model.attention.gate={gate}"]
    model = build_model(composed(*SMALL, *choice), VOCAB)
    for block in model.blocks():
        block.attention.out_norm.eps = 1e-3  # an output's length is at least 0.03, in both
    assert_same_to_rounding(model, device, torch.bfloat16)


@on_each_device
@pytest.mark.parametrize("overrides", [["model=moe"], ["model=moe", "model.ffn.num_experts=64"], ["model=hybrid"]])
def test_a_model_of_every_kind_equals_its_definition_in_fp64(composed, device, overrides):
    assert_same_to_rounding(build_model(composed(*SMALL, *overrides), VOCAB), device, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_forward_and_backward_never_synchronize_with_the_gpu(composed, name):
    model = build_model(composed(*SMALL, f"model={name}"), VOCAB).cuda()
    ids = torch.randint(VOCAB, (2, 80), device="cuda")
    positions, documents = torch.arange(80, device="cuda").expand(2, 80), torch.zeros_like(ids)
    for mode in ("default", "error"):  # the first pass compiles and allocates
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                out = model(ids, positions=positions, document_ids=documents)
                loss = linear_cross_entropy(out.hidden, model.lm_head.weight, ids)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_each_device
@in_each_precision
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("empty", [False, True], ids=["full", "empty slots"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "unit outputs"])
def test_experts_equal_the_loop_over_tokens_in_fp64(device, dtype, slots, empty, normalize):
    experts = Experts(d_model=64, d_expert=48, num_experts=6, top_k=slots, normalize_outputs=normalize)
    x, slope = torch.randn(2, 200, 64)
    ids = torch.stack([torch.randperm(5)[:slots] for _ in range(200)])  # the sixth expert has no token
    weights, is_empty = torch.rand(200, slots), torch.rand(200, slots) < 0.4
    if empty:
        ids, weights = ids.masked_fill(is_empty, 6), weights.masked_fill(is_empty, 0)

    def outputs(run, device, wide):
        inputs = [t.to(device, wide).requires_grad_() for t in (x, weights)]
        own = copy.deepcopy(experts).to(device, wide)
        logits = torch.zeros(200, 6, device=device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=wide == torch.float32 and dtype == torch.bfloat16):
            y = run(inputs[0], Routing(ids.to(device), inputs[1], logits, logits), own)
        gradients = torch.autograd.grad(y, [*inputs, *own.parameters()], slope.to(y))
        return [t.detach().cpu().double() for t in (y, *gradients)]

    truths = outputs(loop_over_tokens, "cpu", torch.float64)
    fast = outputs(lambda x, routing, own: own(x, routing, has_empty_slots=empty)[0], device, torch.float32)
    for value, truth in zip(fast, truths, strict=True):
        assert (value - truth).norm() / truth.norm() < ROUNDING[dtype]


class Parts(nn.Module):
    """A module with one tensor of each shape that update rules treat differently."""

    def __init__(self):
        super().__init__()
        shapes = {"tall": (96, 32), "wide": (32, 96), "square": (64, 64), "experts": (4, 32, 48), "vector": (64,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


@on_each_device
@pytest.mark.parametrize("name", options("optimizer"))
def test_an_optimizer_updates_weights_as_on_the_cpu_in_fp64(device, name):
    start, slopes = Parts(), [Parts() for _ in range(4)]

    def moved(device, dtype):
        parts = copy.deepcopy(start).to(device, dtype)
        named = dict(parts.named_parameters())
        groups = [
            {
                "params": [p],
                "names": [n],
                "kind": "vector" if n == "vector" else "matrix",
                "lr": 0.01,
                "weight_decay": 0.1,
            }
            for n, p in named.items()
        ]
        optimizer = build_piece("optimizer", name, params=groups)
        for slope in slopes:
            for p, g in zip(parts.parameters(), slope.parameters(), strict=True):
                p.grad = g.detach().to(device, dtype)
            optimizer.step()
        return {n: p.detach().cpu().double() - start.get_parameter(n).double() for n, p in named.items()}

    truths, moves = moved("cpu", torch.float64), moved(device, torch.float32)
    for tensor, truth in truths.items():
        # Muon's iteration may run in bf16; a sign turns only where its average all but vanishes
        assert (moves[tensor] - truth).norm() / truth.norm() < 0.02, tensor


@pytest.mark.parametrize(("device", "compiled"), RUNS[: 1 + 2 * torch.cuda.is_available()])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("model", options("model"))
def test_a_run_has_the_losses_of_an_eager_run_on_the_cpu(composed, tiny, tmp_path, device, compiled, precision, model):
    kept = [t for t in tiny if t != "trainer=cpu"]
    short = [f"model={model}", "callbacks.samples=null", "logger=csv", "max_steps=4"]

    def losses(folder, *overrides):
        train(composed(*kept, *short, *overrides), tmp_path / folder)
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [row["train/loss"] for row in rows if "train/loss" in row]

    expected = losses("cpu", "trainer=cpu", "trainer.precision=32-true", "compile=false")
    trainer = ["trainer=cpu" if device == "cpu" else "trainer=gpu", f"trainer.precision={precision}"]
    found = losses("device", *trainer, f"compile={str(compiled).lower()}")
    assert found == pytest.approx(expected, rel=1e-4 if precision == "32-true" else 0.01)
