"""Low-rank approximations against their definitions, and the measures of a spectrum at matrices whose rank is known."""

import itertools
import math

import pytest
import torch

from llm.adapt.low_rank import column_row_units, interpolative_units, svd_factors
from llm.errors import ConfigError
from llm.model.factored import FactoredLinear
from llm.ops.spectrum import mean_spectrum, spectrum


def test_svd_factors_have_the_error_of_the_dropped_singular_values():
    matrix = torch.randn(9, 6, dtype=torch.float64)
    second, first = svd_factors(matrix, 4)
    values = torch.linalg.svdvals(matrix)
    error = torch.linalg.svdvals(matrix - second @ first)
    assert float(error[0]) == pytest.approx(float(values[4]), rel=1e-12)  # spectral norm (Eckart and Young)
    assert float(error.norm()) == pytest.approx(float(values[4:].norm()), rel=1e-12)
    torch.testing.assert_close(second.norm(), first.norm())


def test_an_interpolative_decomposition_keeps_columns_and_is_exact_at_the_rank_of_the_matrix():
    units = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 8, dtype=torch.float64)
    kept, mixing = interpolative_units(units, 3)
    torch.testing.assert_close(units[:, kept] @ mixing, units)
    torch.testing.assert_close(mixing[:, kept], torch.eye(3, dtype=torch.float64))


def test_an_interpolative_decomposition_is_near_the_best_choice_of_columns():
    units = torch.randn(40, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    kept, mixing = interpolative_units(units, 4)
    error = float((units - units[:, kept] @ mixing).norm())
    best = min(_least_squares_error(units, list(chosen)) for chosen in itertools.combinations(range(7), 4))
    assert best <= error <= 2.5 * best
    assert error == pytest.approx(_least_squares_error(units, kept), rel=1e-9)  # the mixing is the least-squares one


def _least_squares_error(units, chosen):
    part = units[:, chosen]
    return float((units - part @ torch.linalg.lstsq(part, units).solution).norm())


def test_columns_by_norm_are_those_with_the_largest_products_of_norms():
    units, weight = torch.randn(20, 6), torch.randn(5, 6)
    sizes = [float(units[:, i].norm() * weight[:, i].norm()) for i in range(6)]
    expected = sorted(sorted(range(6), key=lambda i: -sizes[i])[:3])
    assert column_row_units(units, weight, 3) == expected


def test_the_measures_of_a_spectrum_count_equal_singular_values():
    four = spectrum(torch.tensor([2.0, 2.0, 2.0, 2.0]))
    assert four == pytest.approx((4.0, 4.0, 1.0, 1.0))
    one = spectrum(torch.tensor([3.0, 0.0, 0.0, 0.0]))
    assert one == pytest.approx((1.0, 1.0, 0.0, 0.25))
    assert spectrum(torch.zeros(3)) == (0.0, 0.0, 0.0, 0.0)


def test_the_measures_of_a_spectrum_equal_their_definitions():
    values = [3.0, 1.0]
    p, q = [0.75, 0.25], [0.9, 0.1]
    found = spectrum(torch.tensor(values))
    assert found.effective_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert found.stable_rank == pytest.approx(10 / 9)
    assert found.entropy == pytest.approx(-sum(x * math.log(x) for x in q) / math.log(2))


def test_a_stack_of_matrices_has_the_mean_of_their_measures():
    stack = torch.stack([torch.eye(4), torch.diag(torch.tensor([1.0, 0, 0, 0]))])
    assert mean_spectrum(stack).effective_rank == pytest.approx(2.5)


def test_a_factored_projection_computes_its_product():
    layer = FactoredLinear(d_in=6, d_out=5, rank=2)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


FACTORED = ("model.low_rank={q_proj:4,k_proj:3,o_proj:5,down_proj:6}",)
SMALL = ("model.d_model=32", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn.d_ff=48")


def test_factored_projections_of_a_model_have_their_ranks_and_count_in_its_flops(composed):
    from llm.config.build import build_model

    whole, narrow = (build_model(composed(*SMALL, *extra), 50) for extra in ((), FACTORED))
    attention, ffn = narrow.layers[1].attention, narrow.layers[1].ffn
    assert attention.o_proj.first.weight.shape == (5, 32)
    assert torch.linalg.matrix_rank(ffn.down_proj.weight) == 6
    saved = 2 * 2 * (32 * 32 - 4 * 64 + 16 * 32 - 3 * 48 + 32 * 32 - 5 * 64 + 48 * 32 - 6 * 80)  # layers, per weight
    assert whole.flops_per_token(16) - narrow.flops_per_token(16) == saved
    heads = attention.parameter_heads
    assert heads == {
        "q_proj.second.weight": 4,
        "k_proj.second.weight": 2,
        "v_proj.weight": 2,
        "o_proj.first.weight": -4,
    }
    # o_proj writes to the residual stream, whose depth factor its second matrix has
    assert narrow.initial_stds["layers.0.attention.o_proj.second.weight"] == pytest.approx(5**-0.5 / 2)
    assert narrow.initial_stds["layers.0.attention.q_proj.second.weight"] == pytest.approx(4**-0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("model.low_rank={q_prj:4}", "model.low_rank.q_prj=4: the model has no such projection.*did you mean q_proj"),
        ("model.low_rank={k_proj:17}", r"model.low_rank.k_proj=17: must lie in \[1, 16\]"),
        ("model.low_rank={k_proj:0}", r"model.low_rank.k_proj=0: must lie in \[1, 16\]"),
    ],
)
def test_a_rank_that_no_projection_has_is_refused(composed, given, message):
    from llm.config.check import check

    with pytest.raises(ConfigError, match=message):
        check(composed(*SMALL, given))
