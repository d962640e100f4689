import pytest
import torch


@pytest.fixture
def rows():
    """Inputs of two rows: `x`, positions that restart in each document, and ids of documents at different places."""

    def make(time, *, batch=2, d_model=48, documents=True):
        x = torch.randn(batch, time, d_model)
        ids = torch.zeros(batch, time, dtype=torch.long)
        if documents:
            for row in range(batch):
                for cut in (time // 5 + 3 * row, time // 2 + row, time // 2 + row + 1):
                    ids[row, cut:] += 1 if 0 < cut < time else 0
        places = torch.arange(time).expand(batch, -1)
        starts = torch.where(torch.nn.functional.pad(ids, (1, 0), value=-1).diff(dim=1) > 0, places, 0)
        return x, places - starts.cummax(dim=1).values, ids

    return make
