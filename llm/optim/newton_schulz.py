"""Orthogonalisation by Newton-Schulz iteration, with fewer matrix products than the published loop."""

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llm.optim.checks import one_of


class Iteration(NamedTuple):
    """Coefficients (a, b, c) of each step x ← a·x + b·x³ + c·x⁵ on the singular values, and the margin of the input."""

    coefficients: tuple[tuple[float, float, float], ...]
    margin: float
    """The input is divided by margin · ‖X‖_F before the first step."""
    gram_steps: int
    """Number of steps taken on the first Gram matrix in bfloat16, whose rounding errors grow by a² per step. Three
    steps of the quintic have 0.6 to 1.9 times the error of the published loop. Four exceed its bounds for singular
    values that fall as 1/i. Two steps of Polar Express have up to 6 times the error."""


PAPER_POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
"""Best odd polynomials of degree 5 for singular values in [1e-3, 1], in order; each maps its interval to [1 - e, 1 + e]
with the least e.
"""

PAPER_SAFETY = 1.01
"""Algorithm 1 evaluates each polynomial at x/1.01, so that rounding errors cannot leave the interval."""

ITERATIONS = {
    # Jordan et al., "Muon: An optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon, 2024
    "quintic": Iteration(((3.4445, -4.7750, 2.0315),) * 5, margin=1.0, gram_steps=3),
    # Amsel et al., "The Polar Express", arXiv:2505.16932, with the coefficients of nanochat and modded-nanogpt: five
    # steps, safety factor 0.02, cushion 2. They differ from those of Algorithm 1, whose safety factor is 0.01.
    "polar_express": Iteration(
        (
            (8.15655, -22.48329, 15.87877),
            (4.04293, -2.80892, 0.50002),
            (3.89167, -2.77248, 0.50606),
            (3.28575, -2.36813, 0.46449),
            (2.34655, -1.70978, 0.42324),
        ),
        margin=1.01,
        gram_steps=1,
    ),
    # The same paper's Algorithm 1, five steps: its first triple is (8.20516, -22.90193, 16.46072)
    "polar_express_paper": Iteration(
        tuple((a / PAPER_SAFETY, b / PAPER_SAFETY**3, c / PAPER_SAFETY**5) for a, b, c in PAPER_POLYNOMIALS),
        margin=1.01,
        gram_steps=1,
    ),
}

PANEL_ROWS = 256
"""Approximate number of rows per panel of a symmetric product, of which only the lower half is computed."""

MIN_GRAM_ROWS = 128
"""Smallest number of rows for steps on a Gram matrix; rounding errors matter more in a smaller Gram matrix."""

MAX_PANELS = 3
"""Largest number of panels; more panels save fewer operations than they lose in speed."""

SAFE_NORM = 1e-8
"""Norms between this value and its inverse neither overflow nor underflow when squared in fp32."""


def newton_schulz_reference(x: Float[Tensor, "rows columns"], *, iteration: str) -> Float[Tensor, "rows columns"]:
    """Run the published loop on one matrix in the dtype of `x`; tests compare `orthogonalize` with it."""
    coefficients, margin, _ = find_iteration(iteration)
    norm = torch.linalg.matrix_norm(x)
    x = x / (margin * norm) if norm > 0 else x
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@torch.no_grad()
def orthogonalize(
    x: Float[Tensor, "*stack rows columns"], *, iteration: str, dtype: torch.dtype
) -> Float[Tensor, "*stack rows columns"]:
    """Replace the singular values of each matrix in `x` by values around 1: U·Σ·Vᵀ → about U·Vᵀ.

        A = X·Xᵀ;  X ← a·X + (b·A + c·A²)·X,  five times, from X/‖X‖_F

    The quintic maps singular values in [0.01, 1] (relative to the norm) into [0.682, 1.135], none above 1.203.
    The first steps on a wide matrix use its small Gram matrix. With P = a + b·A + c·A², the products A ← P·A·P and
    Q ← P·Q are between small symmetric matrices, and X ← Q·X follows once. The last steps are taken on X itself, which
    corrects rounding errors of the first ones. Only half of each symmetric product is computed.

    Args:
        x: matrices in the last two dimensions, of any scale; a zero matrix stays zero.
        iteration: a key of ITERATIONS.
        dtype: dtype of the products.

    Raises:
        ConfigError: if the iteration is unknown.

    Source: Jordan et al. 2024, "Muon"; "Polar Express", arXiv:2505.16932.
    Differs: the published loop adds 1e-7 to the norm, which shrinks small updates; here nothing is added.
    """
    found = find_iteration(iteration)
    flat = x.reshape(-1, *x.shape[-2:])
    # on a CPU single products are faster than batched ones, except for stacks of small matrices
    if x.device.type == "cpu" and min(x.shape[-2:]) >= (PANEL_ROWS // 2 if len(flat) == 1 else PANEL_ROWS):
        pieces = [iterate(normalized(matrix, margin=found.margin, dtype=dtype), found) for matrix in flat]
        out = torch.stack(pieces) if len(pieces) > 1 else pieces[0]
    else:
        out = iterate(normalized(flat, margin=found.margin, dtype=dtype), found)
    return out.view(x.shape)


def find_iteration(name: str) -> Iteration:
    """Return the iteration called `name`, or raise ConfigError."""
    return ITERATIONS[one_of("iteration", name, ITERATIONS)]


def normalized(
    x: Float[Tensor, "*stack rows columns"], *, margin: float, dtype: torch.dtype
) -> Float[Tensor, "*stack rows columns"]:
    """Return x / (margin · ‖x‖_F) for each matrix, and 0 for a zero one; norms are fp32, the result `dtype`."""
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    if x.device.type != "cpu" or not bool(((norm > SAFE_NORM) & (norm < 1 / SAFE_NORM)).all()):
        peak = x.abs().amax((-2, -1), keepdim=True)  # divide by the largest element first, since squares could overflow
        x = x.float() / torch.where(peak > 0, peak, 1.0)
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return torch.mul(x, 1 / torch.where(norm > 0, margin * norm, 1.0), out=torch.empty_like(x, dtype=dtype))


@cache
def sections(iteration: Iteration, *, ratio: float, share: float) -> tuple[int, ...]:
    """Return the numbers of steps per Gram matrix: the cheaper of one step each, and several on the first.

    Args:
        iteration: iteration that is planned.
        ratio: columns divided by rows, >= 1.
        share: cost of a symmetric product divided by that of a full one, in (0, 1].
    """
    count, first = len(iteration.coefficients), iteration.gram_steps
    plans = [(1,) * count, (first, *(1,) * (count - first))]

    def cost(plan: tuple[int, ...]) -> float:
        return sum(share * (2 * ratio + 2 * k + 6 * (k - 1)) + 2 * ratio for k in plan)

    return min(plans, key=cost)


def iterate(x: Tensor, iteration: Iteration) -> Tensor:
    """Run all steps on a matrix or a stack; for a tall matrix multiply from the right, by the smaller Gram matrix.

    No product has a scalar that depends on data. oneDNN compiles alpha and beta of a bf16 product into its kernel, so
    a norm passed as alpha would compile and cache a new kernel per matrix and update.
    """
    rows, columns = sorted(x.shape[-2:])
    panels = count_panels(x)
    share = (panels + 1) / (2 * panels)
    step = 0
    plan = (
        sections(iteration, ratio=columns / rows, share=share)
        if rows >= MIN_GRAM_ROWS
        else (1,) * len(iteration.coefficients)
    )
    for length in plan:
        x = run_section(x, iteration.coefficients[step : step + length], panels)
        step += length
    return x


def run_section(x: Tensor, coefficients: tuple[tuple[float, float, float], ...], panels: int) -> Tensor:
    """Apply the steps with the given coefficients to x, using one Gram matrix."""
    is_tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if is_tall else x
    gram = symmetric_product(wide, wide, panels=panels)
    total = None
    for i, (a, b, c) in enumerate(coefficients):
        update = symmetric_product(gram, gram, add=gram, beta=b, alpha=c, panels=panels)  # b·A + c·A²
        if len(coefficients) == 1:
            pair = (x, update.mT) if is_tall else (update, x)
            # adding a to the diagonal of the update would round it to bfloat16 and exceed the bounds
            return multiply(*pair, add=x, beta=a)
        if i < len(coefficients) - 1:
            half = symmetric_product(update, gram, add=gram, beta=a, panels=panels)  # P·A; A and P commute
            gram = symmetric_product(update, half, add=half, beta=a, panels=panels)
        if total is None:
            total = update
            total.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            total = symmetric_product(update, total, add=total, beta=a, panels=panels)
    if total is None:
        return x
    return x @ total.mT if is_tall else total @ x  # rounding has made `total` slightly asymmetric


def multiply(left: Tensor, right: Tensor, *, add: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """Return beta · add + alpha · left · right."""
    operation = torch.addmm if left.ndim == 2 else torch.baddbmm
    return operation(add, left, right, beta=beta, alpha=alpha)


def count_panels(x: Tensor) -> int:
    """Return the panels of symmetric products of `x`: several on a CPU, where products are limited by arithmetic."""
    return min(MAX_PANELS, max(1, min(x.shape[-2:]) // PANEL_ROWS)) if x.device.type == "cpu" and x.ndim == 2 else 1


def symmetric_product(
    left: Tensor, right: Tensor, *, panels: int, add: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Return beta · add + alpha · left · rightᵀ, a symmetric matrix, by computing and mirroring its lower panels."""
    if panels == 1:
        return left @ right.mT if add is None else multiply(left, right.mT, add=add, beta=beta, alpha=alpha)
    size = left.shape[0]
    out = left.new_empty(size, size)
    bounds = [round(size * i / panels) for i in range(panels + 1)]
    for start, end in pairwise(bounds):
        target, rows, columns = out[start:end, :end], left[start:end], right[:end].mT
        if add is None:
            torch.mm(rows, columns, out=target)
        else:
            torch.addmm(add[start:end, :end], rows, columns, beta=beta, alpha=alpha, out=target)
        if start:
            mirror(out, start, end)
    return out


def mirror(out: Tensor, start: int, end: int) -> None:
    """Copy the block left of the diagonal block at `start` above it, transposed; bits of bfloat16 copy faster."""
    bits = out.view(torch.int16) if out.dtype == torch.bfloat16 else out
    bits[:start, start:end] = bits[start:end, :start].mT
