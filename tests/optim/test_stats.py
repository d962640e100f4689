import pytest
import torch

from llm.optim.newton_schulz import orthogonalize
from llm.optim.stats import Move, kind_stats, moves_to_come, orthogonality_error, pooled_rms, sampled_orthogonality


def test_rms_is_pooled_over_elements_not_over_tensors():
    assert pooled_rms([torch.tensor([3.0]), torch.tensor([0.0, 0.0, 0.0])]).item() == 1.5


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24), (3, 8, 20)])
def test_an_orthogonal_matrix_of_any_size_has_no_error(shape):
    q = torch.linalg.qr(torch.randn(*shape[:-2], max(shape[-2:]), min(shape[-2:]))).Q
    q = q if shape[-2] >= shape[-1] else q.mT
    assert orthogonality_error(7.0 * q).item() < 1e-5  # fp32 rounding of the factorisation


def test_the_error_distinguishes_signs_from_orthogonal_updates():
    g = torch.randn(128, 256)
    # independent signs: the off-diagonal of U·Uᵀ/n is noise of variance 1/n, so e = √(m/n)
    assert orthogonality_error(g.sign()).item() == pytest.approx(0.5**0.5, rel=0.1)
    # singular values in [0.682, 1.135]: their squares spread by at most (1.29 − 0.46) / 2 around a mean of 0.88
    assert orthogonality_error(orthogonalize(g, iteration="quintic", dtype=torch.float32)).item() < 0.48


def test_an_update_of_zeros_causes_no_division_by_zero():
    assert orthogonality_error(torch.zeros(3, 4)).item() == pytest.approx(1.0)


def test_stats_of_a_kind_are_those_of_all_its_groups():
    parameters = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0]])]
    rates = [{"kind": "matrix", "lr": lr, "weight_decay": 0.0} for lr in (0.1, 0.2)]
    groups = [{"params": [p], **its} for p, its in zip(parameters, rates, strict=True)]
    moves = moves_to_come(groups)
    assert [move.lr for move in moves["matrix"]] == [0.1, 0.2]
    parameters[0][0, 1], parameters[1][0, 0] = 2.0, 2.0
    stats = kind_stats(moves["matrix"])
    assert stats["update_rms"].item() == pytest.approx((8 / 3) ** 0.5)
    assert stats["weight_rms"].item() == pytest.approx((17 / 3) ** 0.5)
    assert stats["update_ratio"].item() == pytest.approx((8 / 17) ** 0.5)


@pytest.mark.parametrize("samples", [1, 2, 5, 9])
def test_orthogonality_is_sampled_without_the_decay(samples):
    before = [torch.randn(8, 8) for _ in range(5)]
    updates = [torch.linalg.qr(torch.randn(8, 8)).Q for _ in range(5)]
    after = [old * (1 - 0.1 * 3.0) - 0.1 * update for old, update in zip(before, updates, strict=True)]
    moves = [Move(new, old, 0.1, 3.0) for new, old in zip(after, before, strict=True)]
    assert sampled_orthogonality(moves, samples=samples).item() < 1e-4  # fp32 differences of numbers near 1
