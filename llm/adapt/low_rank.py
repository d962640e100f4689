"""Approximations of matrix products: singular values, interpolative decomposition, and columns by norm."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import interpolative
from torch import Tensor


def svd_factors(matrix: Float[Tensor, "d_out d_in"], rank: int) -> tuple[Tensor, Tensor]:
    """Return B [d_out, rank] and A [rank, d_in] whose product is the nearest matrix of this rank.

    The singular values are shared evenly: B = U √S and A = √S Vᵀ, so that both factors have the same norm. No matrix of
    this rank is nearer in the Frobenius or the spectral norm.

    Source: Eckart and Young, Psychometrika 1 (1936); kexue.fm/archives/10407.
    """
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def interpolative_units(
    activations: Float[Tensor, "tokens units"], rank: int
) -> tuple[list[int], Float[Tensor, "rank units"]]:
    """Return the units that represent all others, and T with H ≈ H[:, kept] T; T is the identity on the kept ones.

    A pivoted QR decomposition chooses the units. A layer W that reads H then becomes W Tᵀ, which reads the kept units.

    Source: Liberty et al., "Randomized algorithms for the low-rank approximation of matrices", PNAS 104 (2007);
    kexue.fm/archives/10501; used for hidden units by Chee et al., arXiv:2108.00065, section 3.
    """
    matrix = activations.double()
    if matrix.shape[0] > matrix.shape[1]:  # R of a QR decomposition has the same inner products in fewer rows
        matrix = torch.linalg.qr(matrix, mode="r").R
    found: Any = interpolative.interp_decomp(np.array(matrix.cpu().numpy()), rank, rand=False)
    order, projection = found  # three values where a precision is given instead of a rank
    kept = [int(index) for index in order[:rank]]
    mixing = torch.zeros(rank, matrix.shape[1], dtype=torch.float64)
    mixing[:, torch.as_tensor(order.astype(np.int64))] = torch.cat(
        [torch.eye(rank, dtype=torch.float64), torch.as_tensor(projection)], dim=1
    )
    return kept, mixing


def column_row_units(
    activations: Float[Tensor, "tokens units"], weight: Float[Tensor, "d_out units"], rank: int
) -> list[int]:
    """Return the units i with the largest ‖H_i‖ ‖W_i‖: those whose columns and rows dominate H Wᵀ = Σ_i H_i W_iᵀ.

    The others are dropped without a correction, which is the CR approximation of a matrix product.

    Source: Drineas, Kannan and Mahoney, "Fast Monte Carlo algorithms for matrices I", SIAM J. Comput. 36 (2006), with
    the largest columns instead of random ones; kexue.fm/archives/10427.
    """
    sizes = activations.double().norm(dim=0) * weight.double().norm(dim=0)
    return sorted(sizes.topk(rank).indices.tolist())
