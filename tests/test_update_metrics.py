"""Metrics of an update are exchanged between ranks together."""

import torch

from llm.training.update_metrics import UpdateMetrics


def test_all_metrics_of_an_update_need_one_exchange_per_dtype_and_keep_their_shapes():
    calls = []

    def reduce(value, how):
        calls.append((how, value.dtype, value.numel()))
        return value * 2

    metrics = UpdateMetrics(reduce)
    for micro in (1.0, 3.0):
        metrics.collect(
            {
                "train/loss": torch.tensor(micro),
                "train/layer0/load": torch.tensor([[micro, 2 * micro]]),
                "train/layer0/stat/counts": torch.tensor([1, 2]),
                "train/layer1/stat/sums": torch.ones(2, 2),
                "train/layer1/stat/more": torch.ones(3),
            }
        )
    losses, means = metrics.close()
    assert losses.tolist() == [1.0, 3.0]
    assert means["train/loss"].shape == ()
    assert means["train/loss"].item() == 4.0
    assert means["train/layer0/load"].tolist() == [[4.0, 8.0]]
    statistics = metrics.take_statistics()
    assert metrics.statistics_of_layer(0, statistics)["counts"].tolist() == [4, 8]
    assert metrics.statistics_of_layer(1, statistics)["sums"].tolist() == [[4.0, 4.0], [4.0, 4.0]]
    assert calls == [("mean", torch.float32, 3), ("sum", torch.int64, 2), ("sum", torch.float32, 7)]
    assert metrics.take_statistics() == {}
