import pytest
import torch
from torch import nn

from llm.optim.param_groups import build_param_groups
from llm.optim.receipt import lines, receipt


def adamw(model):
    groups = build_param_groups(model, lr=0.01, weight_decay=0.1)
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, fused=True)


@pytest.fixture
def model():
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5), nn.LayerNorm(5))


def test_the_receipt_names_every_tensor_with_its_rule(model):
    found = {line.name: line for line in lines(adamw(model))}
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert found["1.weight"][1:] == ((5, 6), "matrix", "adamw", 0.01, 0.1, 8 * 30)
    assert found["2.weight"].weight_decay == 0.0


def test_the_predicted_state_bytes_equal_those_after_a_step(model):
    optimizer = adamw(model)
    before = [line.state_bytes for line in lines(optimizer)]
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()
    assert [line.state_bytes for line in lines(optimizer)] == before


def test_the_lr_in_the_receipt_is_the_peak_even_during_warmup(model):
    optimizer = adamw(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert {line.lr for line in lines(optimizer)} == {0.01}


def test_the_text_totals_bytes_by_kind(model):
    text = receipt(adamw(model))
    total = text.strip().splitlines()[-1].split()
    numel = sum(p.numel() for p in model.parameters())
    assert total == ["all", "5", str(numel), str(8 * numel), "8.00"]
    assert "1.weight" in text
    assert "5 x 6" in text


def test_tensors_that_differ_only_in_their_layer_can_be_combined_in_one_row():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), "head": nn.Linear(4, 2)})
    whole, folded = receipt(adamw(model)), receipt(adamw(model), across_layers=True)
    rows = {line.split("  ")[0]: line.split()[-1] for line in folded.splitlines() if line}
    assert rows["3 x layers.*.weight"] == str(3 * 8 * 16)
    assert rows["head.weight"] == str(8 * 8)
    assert whole.splitlines()[-4:] == folded.splitlines()[-4:]  # the totals


def test_the_peak_rate_is_that_of_the_batch_rule():
    text = receipt(adamw(nn.Linear(2, 2, bias=False)), lr_scale=0.125)
    (row,) = [line for line in text.splitlines() if line.startswith("weight")]
    rate = float(row.split()[-3])
    assert rate == pytest.approx(0.125 * float(receipt(adamw(nn.Linear(2, 2, bias=False))).splitlines()[1].split()[-3]))
