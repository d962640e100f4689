"""How much of the gradient's noise momentum leaves in a step, which multiplies the noise scale in the batch laws."""

from collections.abc import Mapping
from typing import Any

from llm.errors import ConfigError
from llm.scaling.derivation import rule_of_factory
from llm.scaling.half_life import keep_half_life
from llm.scaling.suitability import traits_of


def equivalent_momentum(optimizer: Any, settings: Mapping[str, Any]) -> float:
    """Return the β of an exponential average that leaves as much noise as the optimizer's own momentum.

        c = w₀² + w₁²/(1 − r²) for weights w₀, w₁, w₁r, w₁r², … of sum 1;   β = (1 − c)/(1 + c)

    c is 1/86.1 for Lion (0.95, 0.98), 1/56.1 for Tiger (0.965) and 1/32.9 for Muon with Nesterov (0.95).

    Args:
        optimizer: class or factory of the optimizer.
        settings: its settings.

    Raises:
        ConfigError: if nothing is known about the optimizer.

    Source: Su, kexue.fm/archives/11260 and 11280.
    """
    traits = traits_of(optimizer)
    if traits is None or traits.momentum_weights is None:
        raise ConfigError(
            f"scaling.momentum=auto: the momentum of {rule_of_factory(optimizer)[0].__name__} is unknown; set "
            "scaling.momentum to the decay rate of its momentum, or null for none"
        )
    newest, previous, ratio = traits.momentum_weights(settings)
    share = newest**2 + previous**2 / (1 - ratio**2)
    return (1 - share) / (1 + share)


def momenta(optimizer: Any, settings: Mapping[str, Any], *, ratio: float, keeps_half_life: bool) -> float | list[float]:
    """Return the equivalent momentum of a run; at its batch and at the base where half-lives in tokens are kept.

    Args:
        optimizer: class or factory of the optimizer.
        settings: its settings at the base batch.
        ratio: the batch divided by the base batch.
        keeps_half_life: whether decay rates change with the batch.
    """
    base = equivalent_momentum(optimizer, settings)
    if not keeps_half_life or ratio == 1:
        return base
    return [equivalent_momentum(optimizer, keep_half_life(settings, ratio=ratio, lr_scale=1.0)), base]
