import torch
from torch import nn

from llm.ops.memory import SavedBytes, optimizer_state_bytes


def group(kind, *shapes):
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    return {
        "params": parameters,
        "names": [str(i) for i in range(len(shapes))],
        "kind": kind,
        "lr": 1e-3,
        "weight_decay": 0.0,
    }


def test_adamw_stores_eight_bytes_per_parameter_and_a_counter_per_tensor():
    groups = [group("matrix", (300, 200), (64, 64)), group("vector", (64,))]
    assert optimizer_state_bytes(groups, torch.optim.AdamW) == {"matrix": 8 * (60000 + 4096) + 8, "vector": 8 * 64 + 4}


def test_momentum_sgd_stores_four_bytes_per_parameter():
    build = lambda groups: torch.optim.SGD(groups, momentum=0.9)  # noqa: E731
    assert optimizer_state_bytes([group("matrix", (300, 200))], build) == {"matrix": 4 * 60000}


def test_saved_bytes_counts_each_storage_once_and_excludes_weights():
    model = nn.Linear(32, 64, bias=False)
    x = torch.randn(8, 32)
    with SavedBytes(model) as saved:
        y = model(x)
        (y * y).sum()
    assert saved.total == 4 * (8 * 32 + 8 * 64)
