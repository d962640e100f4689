"""Rules that scale a tuned learning rate to another batch size: lr_scale = f(batch_tokens), which is 1 at the base.

The rules `variance`, `sign`, `adam` and `adam_eps` are cases of one law. Let g be the gradient, φ the gradient of a
batch, and Σ the covariance of one token's gradient. Let x = noise_scale / B with noise_scale = tr Σ / |g|². A step
along φ / √(φ² + ε²) lowers the loss most at the learning rate

    lr(B) ∝ √(1 + ρ + x) / (q + x),    ρ = (ε / RMS(g))²,    q = sign(g)ᵀ H sign(g) / tr H

Momentum averages noise over updates: it multiplies x by c, the sum of its squared weights, (1 − β) / (1 + β) for an
exponential average. Adam's first moment sees c·x and its second moment x. noise_scale must be that of raw gradients.

This is a mean-field result for elements of g that have one size. With ρ = 0 the step is the sign of the gradient. With
ρ → ∞ it is the gradient itself, and the law is that of SGD, 1 / (q + x). No rule changes betas, eps or weight decay;
`keep_half_life` does, see `llm.scaling.half_life`, and c is then taken at each batch.

Source of the momentum: Su, kexue.fm/archives/11260, 11280, 11285 and 11301.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from llm.errors import ConfigError

NoiseScale = float | Literal["measured"]
AUTO = "auto"
"""Value of `scaling.momentum` that takes the momentum of the optimizer in use; see `llm.scaling.momentum`."""
Momentum = float | Sequence[float] | Literal["auto"] | None
"""Decay rate β of the optimizer's momentum; two where `keep_half_life` changes it: at the run's batch, and at the base.
`auto` takes that of the optimizer in use, and None leaves momentum out, c = 1."""


def none(batch_tokens: int, *, base_batch_tokens: int | None) -> float:
    """Return 1, so that the learning rate does not depend on the batch."""
    _ratio(batch_tokens, base_batch_tokens)
    return 1.0


def linear(batch_tokens: int, *, base_batch_tokens: int | None) -> float:
    """Return B/B₀, which keeps the drift of SGD per token.

    Assumes plain SGD, a learning rate small relative to the inverse curvature, and B far below the noise scale.

    Args:
        batch_tokens: tokens per update, B.
        base_batch_tokens: tokens per update at which the learning rate was tuned, B₀.

    Source: Goyal et al., "Accurate, Large Minibatch SGD", arXiv:1706.02677, section 2.1; limits in McCandlish et
    al., arXiv:1812.06162, eq. 2.6.
    """
    return _ratio(batch_tokens, base_batch_tokens)


def sqrt(batch_tokens: int, *, base_batch_tokens: int | None) -> float:
    """Return √(B/B₀), which keeps the noise that Adam or RMSprop adds per token.

    Assumes that gradient noise dominates the signal, so B is far below the noise scale. The published rule also scales
    1 − β by B/B₀, eps by √(B₀/B) and weight decay by √(B/B₀); set `keep_half_life=true` for these.

    Args:
        batch_tokens: tokens per update, B.
        base_batch_tokens: tokens per update at which the learning rate was tuned, B₀.

    Source: Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", arXiv:2205.10287,
    definition 5.3.
    """
    return math.sqrt(_ratio(batch_tokens, base_batch_tokens))


def variance(
    batch_tokens: int, *, base_batch_tokens: int | None, noise_scale: NoiseScale, momentum: Momentum = None
) -> float:
    """Return the best learning rate of SGD, lr_max / (1 + c·B_noise / B), divided by that at the base batch.

    The factor is proportional to B far below the noise scale, and approaches 1 + c·B_noise / B₀ far above it. Assumes a
    step along the batch's gradient on a quadratic loss.

    Args:
        batch_tokens: tokens per update, B.
        base_batch_tokens: tokens per update at which the learning rate was tuned, B₀.
        noise_scale: B_noise = tr(HΣ)/gᵀHg in tokens, approximated by tr Σ/|g|²; > 0, or `measured`.
        momentum: see `Momentum`.

    Source: McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv:1812.06162, eq. 2.6.
    """
    return _relative(lambda x, c: 1 / (1 + c * x), batch_tokens, base_batch_tokens, noise_scale, momentum)


def sign(
    batch_tokens: int,
    *,
    base_batch_tokens: int | None,
    noise_scale: NoiseScale,
    alignment: float,
    momentum: Momentum = None,
) -> float:
    """Return the best learning rate of sign steps, √(1 + c·x) / (q + c·x), divided by that at the base batch.

    The factor is proportional to √B far below c times the noise scale. With q <= 2 it approaches a limit. With q > 2 it
    has a peak at B = c·noise_scale / (q − 2), and larger batches need a smaller lr. Assumes independent Gaussian noise
    and a quadratic loss.

    Args:
        batch_tokens: tokens per update, B.
        base_batch_tokens: tokens per update at which the learning rate was tuned, B₀.
        noise_scale: tr Σ/|g|² in tokens, > 0, or `measured`.
        alignment: q = sign(g)ᵀ H sign(g) / tr H, > 0. It is 1 for a diagonal curvature H, and larger if the curvature
            along a step of all weights exceeds the sum of those along steps of single weights.
        momentum: see `Momentum`.

    Source: Su, kexue.fm/archives/10542 and 11280; Li et al., "Surge Phenomenon in Optimal Learning Rate and Batch
    Size Scaling", arXiv:2405.14578, eq. 17, which is the same law with its peak at the noise scale.
    Differs: 10542 has (π/2)·noise_scale in place of noise_scale; its constant is exact only far below the noise scale.
    """
    _check_positive("alignment", alignment, "1 has no peak, 3 has it at the noise scale")
    return _relative(
        lambda x, c: math.sqrt(1 + c * x) / (alignment + c * x), batch_tokens, base_batch_tokens, noise_scale, momentum
    )


def adam(
    batch_tokens: int,
    *,
    base_batch_tokens: int | None,
    noise_scale: NoiseScale,
    alignment: float,
    momentum: Momentum = None,
) -> float:
    """Return Adam's best learning rate, √(1 + x) / (q + c·x), divided by that at the base batch.

    The second moment grows with all of the gradient's noise, and the first moment averages it. With q > 2c the factor
    has a peak at B = c·noise_scale / (q − 2c), and larger batches need a smaller lr. With β1 = 0.9 and q = 1 the peak
    lies at 6 % of the noise scale. Without momentum the law is that of `sign`.

    Args:
        batch_tokens: tokens per update, B.
        base_batch_tokens: tokens per update at which the learning rate was tuned, B₀.
        noise_scale: tr Σ/|g|² in tokens, > 0, or `measured`.
        alignment: q = sign(g)ᵀ H sign(g) / tr H, > 0.
        momentum: see `Momentum`; β1 of Adam.

    Source: Su, kexue.fm/archives/11280 and 11301.
    Differs: the posts take one noise for both moments; here the second moment sees all of it.
    """
    return adam_eps(
        batch_tokens,
        base_batch_tokens=base_batch_tokens,
        noise_scale=noise_scale,
        alignment=alignment,
        eps_to_gradient=0.0,
        momentum=momentum,
    )


def adam_eps(
    batch_tokens: int,
    *,
    base_batch_tokens: int | None,
    noise_scale: NoiseScale,
    alignment: float,
    eps_to_gradient: float,
    momentum: Momentum = None,
) -> float:
    """Return Adam's best learning rate with a large eps, relative to the base batch: √(1 + ρ + x) / (q + c·x).

    Equals `adam` at eps_to_gradient = 0 and approaches `variance` as it grows. The factor has a peak only if
    q > 2c (1 + ρ), at B = c·noise_scale / (q − 2c (1 + ρ)). Assumes what `sign` assumes, and that the elements of g
    have one size.

    Args:
        batch_tokens: tokens per update, B.
        base_batch_tokens: tokens per update at which the learning rate was tuned, B₀.
        noise_scale: tr Σ/|g|² in tokens, > 0, or `measured`.
        alignment: q = sign(g)ᵀ H sign(g) / tr H, > 0.
        eps_to_gradient: eps divided by the root mean square of g's elements, >= 0.
        momentum: see `Momentum`; β1 of Adam.

    Source: Su, kexue.fm/archives/10563.
    Differs: all elements of g have one size here, for which the sums over weights have a closed form. Adam's √v + eps
    is approximated by √(v + eps²), so only the order of magnitude of eps is meaningful.
    """
    _check_positive("alignment", alignment, "1 has no peak, 3 has it at the noise scale")
    if not 0 <= eps_to_gradient < math.inf:
        raise ConfigError(
            f"scaling.eps_to_gradient={eps_to_gradient}: must be at least 0; optimizer.eps over the gradient's RMS"
        )
    rho = eps_to_gradient**2
    return _relative(
        lambda x, c: math.sqrt(1 + rho + x) / (alignment + c * x),
        batch_tokens,
        base_batch_tokens,
        noise_scale,
        momentum,
    )


def _relative(
    law: Callable[[float, float], float],
    batch_tokens: int,
    base_batch_tokens: int | None,
    noise_scale: object,
    momentum: Momentum,
) -> float:
    """Return law(noise_scale / B, c) / law(noise_scale / B₀, c₀), or 1 at the base batch, where neither is needed."""
    ratio = _ratio(batch_tokens, base_batch_tokens)
    scale = check_noise_scale(noise_scale)
    own, base = _noise_shares(momentum)
    if ratio == 1:
        return 1.0
    if scale is None:
        raise ConfigError(
            "scaling.noise_scale=measured: nothing has measured it yet; set a number of tokens, such as noise_scale in "
            "the summary of a run with callbacks=noise_scale"
        )
    return law(scale / batch_tokens, own) / law(scale / batch_tokens * ratio, base)


def _noise_shares(momentum: Momentum) -> tuple[float, float]:
    """Return c at the batch of the run and at the base; 1 where momentum is left out, or not known yet at the base."""
    if momentum is None or momentum == AUTO:
        return 1.0, 1.0
    both: list[Any] = (
        list(momentum) if isinstance(momentum, Sequence) and not isinstance(momentum, str) else [momentum] * 2
    )
    if len(both) != 2 or not all(isinstance(b, int | float) and not isinstance(b, bool) and 0 <= b < 1 for b in both):
        raise ConfigError(
            f"scaling.momentum={momentum}: must be a decay rate in [0, 1), auto, or null; 0.9 is AdamW's beta1"
        )
    return noise_share(both[0]), noise_share(both[1])


def noise_share(momentum: float) -> float:
    """Return c = (1 − β)/(1 + β): the sum of the squared weights of an exponential average."""
    return (1 - momentum) / (1 + momentum)


def check_noise_scale(noise_scale: object) -> float | None:
    """Return a noise scale in tokens, or None for `measured`.

    Raises:
        ConfigError: if the value is neither `measured` nor a positive number.
    """
    if noise_scale == "measured":
        return None
    return _check_positive("noise_scale", noise_scale, "set the tokens that a run with callbacks=noise_scale reports")


def _check_positive(key: str, value: object, hint: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"scaling.{key}={value}: must be a number above 0; {hint}")
    return float(value)


def _ratio(batch_tokens: int, base_batch_tokens: int | None) -> float:
    if base_batch_tokens is None or base_batch_tokens < 1:
        raise ConfigError(
            f"scaling.base_batch_tokens={base_batch_tokens}: must be at least 1; set the tokens per update at which "
            "optimizer.lr was tuned"
        )
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens}: must be at least 1; try {base_batch_tokens}")
    return batch_tokens / base_batch_tokens
